"""Writes a checkpoint with random weights for any config: a stand-in where the real weights are too large or absent.

With Hugging Face's default initialisation all tokens end up in nearly the same state and choose the same experts. Here
embeddings have unit variance, a projection keeps the variance of its input, the router is stronger, and its selection
bias is not zero: activations and logits stay near 1 at any width, and tokens spread over the experts as they should.
"""

from __future__ import annotations

import json
import math
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from glm_export.exporter.config import Glm4MoeConfig
from glm_export.exporter.layout import Kind, Parameter, mtp_parameters, parameters, parts
from glm_export.exporter.source.shards import INDEX, SINGLE
from glm_export.runtime.errors import ResourceError, UsageError

_CODES = {"bfloat16": ("BF16", torch.bfloat16), "float16": ("F16", torch.float16), "float32": ("F32", torch.float32)}
_CHUNK = 1 << 22  # elements made at a time: 16 MB of float32

_ROUTER_GAIN = 1.6
_STD = {"embedding": 1.0, "norm": 0.1, "bias": 0.2, "router_bias": 0.05}  # of the others: 1 / sqrt(columns)

# The special tokens of GLM-4.5 in the order of their ids.
_SPECIAL = (
    *("<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", "<|system|>", "<|user|>", "<|assistant|>"),
    *("<|observation|>", "<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>"),
    *("<|begin_of_audio|>", "<|end_of_audio|>", "<|begin_of_transcription|>", "<|end_of_transcription|>"),
    *("<|code_prefix|>", "<|code_middle|>", "<|code_suffix|>", "<think>", "</think>", "<tool_call>", "</tool_call>"),
    *("<tool_response>", "</tool_response>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", "/nothink"),
    *("<|begin_of_box|>", "<|end_of_box|>", "<|image|>", "<|video|>"),
)
_STOPS = ("<|endoftext|>", "<|user|>", "<|observation|>")

_ENGLISH = (
    "the of and to in is that for it was on are as with his they at be this from have or by one had not but what all "
    "were when we there can an your which their said if do will each about how up out them then she many some so these "
    "would other into has more her two like him see time could no make than first been its who now people my made over "
    "did down only way find use may water long little very after words called just where most know"
)

_CHAT_TEMPLATE = r"""[gMASK]<sop>
{%- for message in messages %}
{%- if message.role == 'user' %}<|user|>
{{ message.content }}
{%- if enable_thinking is defined and not enable_thinking and not message.content.endswith('/nothink') %}/nothink
{%- endif %}
{%- elif message.role == 'assistant' %}<|assistant|>
<think></think>
{{ message.content }}
{%- elif message.role == 'tool' %}<|observation|>
<tool_response>
{{ message.content }}
</tool_response>
{%- else %}<|system|>
{{ message.content }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|assistant|>
{%- if enable_thinking is defined and not enable_thinking %}{{ '\n<think></think>' }}
{%- endif %}
{%- endif %}
"""


def write_random_checkpoint(
    config: Glm4MoeConfig,
    directory: str | Path,
    *,
    seed: int = 0,
    dtype: str = "bfloat16",
    shard_bytes: int = 4_000_000_000,
    packed: bool = False,
    mtp: bool = True,
    tokenizer: bool = True,
) -> None:
    """Writes config, generation config, weights, tokenizer and chat template; the same files for the same arguments.

    Args:
        config: any architecture; its dtype is replaced by `dtype`.
        directory: new or empty.
        seed: of all weights; a tensor does not depend on the others, nor on how they are stored.
        dtype: of all tensors except the router bias, which is always float32.
        shard_bytes: a shard is closed before it would hold more weight bytes than this.
        packed: store the experts of a layer in two tensors rather than one by one.
        mtp: write the multi-token-prediction layers the config asks for; without, the config asks for none.
        tokenizer: write tokenizer.json, tokenizer_config.json and chat_template.jinja.

    Raises:
        UsageError: the directory is not empty, the dtype unknown, or the vocabulary too small for a tokenizer.
        ResourceError: not enough disk space.
    """
    directory = Path(directory)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UsageError(f"{directory} exists and is not an empty folder; choose another path or remove it.")
    if seed < 0:
        raise UsageError(f"seed is {seed}, expected 0 or more.")
    if dtype not in _CODES:
        raise UsageError(f"dtype is {dtype!r}, expected one of {', '.join(_CODES)}.")
    table = config.to_hf_dict() | {"dtype": dtype} | ({} if mtp else {"num_nextn_predict_layers": 0})
    config = Glm4MoeConfig.from_dict(table)
    text = make_tokenizer(config) if tokenizer else None  # may refuse, so before the folder is made

    tensors = _tensors(config, packed)
    needed = sum(_bytes(parameter, dtype) for parameter in tensors)
    directory.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise ResourceError(f"the checkpoint needs {needed} bytes but {directory} has {free} free; make space.")

    shards = _shards(tensors, dtype, shard_bytes)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= {parameter.name: name for parameter in shard}
        with (directory / name).open("wb") as file:
            _write_shard(file, shard, dtype, seed)
    if len(shards) > 1:
        _write_json(directory / INDEX, {"metadata": {"total_size": needed}, "weight_map": weight_map})
    stops = {"eos_token_id": list(config.eos_token_id), "pad_token_id": config.pad_token_id}
    _write_json(directory / "generation_config.json", {key: value for key, value in stops.items() if value is not None})
    if text is not None:
        text.save(str(directory / "tokenizer.json"))
        ids = {"eos_token": next(iter(config.eos_token_id), None), "pad_token": config.pad_token_id}
        names = {key: text.id_to_token(i) for key, i in ids.items() if i is not None}
        _write_json(directory / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **names})
        (directory / "chat_template.jinja").write_text(_CHAT_TEMPLATE, encoding="utf-8")
    _write_json(directory / "config.json", table)  # last: without it an unfinished checkpoint is not taken for one


def make_tokenizer(config: Glm4MoeConfig) -> Tokenizer:
    """A small byte-level BPE that knows every byte, some English, and GLM's special tokens.

    The stop tokens have the config's eos ids, the others follow the first of them at GLM's own distances where there is
    room. Ids left over are padding, as in the released vocabulary: they decode to nothing.

    Raises:
        UsageError: `vocab_size` has no room for all bytes and special tokens.
    """
    special = dict(zip(config.eos_token_id, _STOPS, strict=False))
    special |= {i: f"<|stop_{i}|>" for i in config.eos_token_id if i not in special}
    for i, name in ((config.bos_token_id, "<|bos|>"), (config.pad_token_id, "<|pad|>")):
        if i is not None:
            special.setdefault(i, name)
    first = next(iter(config.eos_token_id), config.vocab_size - len(_SPECIAL))
    spare = iter(range(config.vocab_size - 1, -1, -1))
    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    for i, name in enumerate(_SPECIAL, start=first):
        if name in special.values():
            continue
        if i >= config.vocab_size or i in special:
            i = next((j for j in spare if j not in special), -1)
        special[i] = name
    plain = [i for i in range(config.vocab_size) if i not in special]
    if -1 in special or len(plain) < len(bytes_):
        needed = len(bytes_) + len(set(special.values()))
        raise UsageError(
            f"vocab_size is {config.vocab_size}, but a tokenizer needs {needed}; raise it or do without one."
        )

    pieces = list(bytes_)
    merges: list[tuple[str, str]] = []
    for word in _ENGLISH.split():
        whole = "Ġ"  # how byte-level BPE writes a space
        for letter in word:
            if whole + letter not in pieces and len(pieces) < len(plain):
                merges.append((whole, letter))
                pieces.append(whole + letter)
            whole += letter
    vocab = dict(zip(pieces, plain, strict=False)) | {name: i for i, name in special.items()}
    result = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    result.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    result.decoder = decoders.ByteLevel()
    result.add_special_tokens([AddedToken(name, special=True, normalized=False) for _, name in sorted(special.items())])
    return result


def _tensors(config: Glm4MoeConfig, packed: bool) -> list[Parameter]:
    """What is stored, in model order with the MTP layers last."""
    whole = [*parameters(config).values(), *mtp_parameters(config).values()]
    if packed:
        return whole
    return [
        Parameter(name=name, shape=shape, kind="linear" if parameter.kind == "experts" else parameter.kind)
        for parameter in whole
        for name, shape in parts(parameter).items()
    ]


def _dtype(kind: Kind, dtype: str) -> tuple[str, torch.dtype]:
    return _CODES["float32" if kind == "router_bias" else dtype]


def _bytes(parameter: Parameter, dtype: str) -> int:
    return parameter.numel * _dtype(parameter.kind, dtype)[1].itemsize


def _shards(tensors: list[Parameter], dtype: str, shard_bytes: int) -> list[list[Parameter]]:
    shards: list[list[Parameter]] = [[]]
    size = 0
    for parameter in tensors:
        more = _bytes(parameter, dtype)
        if shards[-1] and size + more > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(parameter)
        size += more
    return shards


def _write_shard(file: BinaryIO, shard: list[Parameter], dtype: str, seed: int) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for parameter in shard:
        end = position + _bytes(parameter, dtype)
        code = _dtype(parameter.kind, dtype)[0]
        header[parameter.name] = {"dtype": code, "shape": list(parameter.shape), "data_offsets": [position, end]}
        position = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # so that the tensors are aligned
    file.write(len(encoded).to_bytes(8, "little") + encoded)
    for parameter in shard:
        target = _dtype(parameter.kind, dtype)[1]
        for values in _values(parameter, seed):
            file.write(torch.from_numpy(values).to(target).view(torch.uint8).numpy().data)


def _values(parameter: Parameter, seed: int) -> Iterator[np.ndarray[tuple[int], np.dtype[np.float32]]]:
    """The elements of a tensor in float32, a chunk at a time; packed experts are the experts one after another."""
    std = _STD.get(
        parameter.kind, (_ROUTER_GAIN if parameter.kind == "router" else 1.0) / math.sqrt(parameter.shape[-1])
    )
    for name, shape in parts(parameter).items():
        generator = np.random.Generator(np.random.SFC64([seed, zlib.crc32(name.encode())]))
        count = math.prod(shape)
        for start in range(0, count, _CHUNK):
            values = generator.standard_normal(min(_CHUNK, count - start), dtype=np.float32)
            values *= np.float32(std)
            if parameter.kind == "norm":
                values += 1
            yield values


def _write_json(path: Path, table: dict[str, object]) -> None:
    path.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
