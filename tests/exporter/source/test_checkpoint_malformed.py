"""Classes of malformed checkpoints: how each is made, and what is said about it; exit code 3 for all of them.

The base is the smallest checkpoint there is, in two shards. `LIBRARY` names the classes of shards that the safetensors
library takes all the same.
"""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from cli_tools import refused
from safetensors import SafetensorError, safe_open

from glm_export.exporter.config import Glm4MoeConfig
from glm_export.exporter.layout import parameters
from glm_export.exporter.source.checkpoint import Checkpoint
from glm_export.exporter.source.quantization_config import HF_QUANT_CONFIG
from glm_export.exporter.source.shards import INDEX

CONFIG: dict[str, Any] = {
    "architectures": ["Glm4MoeForCausalLM"],
    "model_type": "glm4_moe",
    "vocab_size": 8,
    "hidden_size": 4,
    "intermediate_size": 4,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
    "partial_rotary_factor": 0.5,
    "attention_bias": False,
    "use_qk_norm": False,
    "moe_intermediate_size": 4,
    "num_experts_per_tok": 1,
    "n_shared_experts": 1,
    "n_routed_experts": 2,
    "routed_scaling_factor": 1.0,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "norm_topk_prob": True,
    "num_nextn_predict_layers": 1,
    "eos_token_id": [7],
}
FIRST, SHARD = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
NORM, HEAD = "model.norm.weight", "lm_head.weight"  # what the second shard holds: 8 bytes, then 64

Files = dict[str, bytes]
Header = dict[str, Any]


def entries(names: Mapping[str, tuple[int, ...]]) -> Header:
    found: Header = {}
    end = 0
    for name, shape in names.items():
        size = 2 * (shape[0] * shape[1] if len(shape) == 2 else shape[0])
        found[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    return found


def shard(header: bytes | Header, data: bytes | None = None) -> bytes:
    """A safetensors file; its data are zeros as long as its tensors, unless they are given."""
    if isinstance(header, dict):
        if data is None:
            data = bytes(max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"))
        header = json.dumps(header).encode()
    return len(header).to_bytes(8, "little") + header + (data or b"")


def base() -> Files:
    shapes = {name: parameter.shape for name, parameter in parameters(Glm4MoeConfig.from_dict(CONFIG)).items()}
    last = {name: shapes.pop(name) for name in (NORM, HEAD)}
    weight_map = dict.fromkeys(shapes, FIRST) | dict.fromkeys(last, SHARD)
    total = 2 * sum(parameter.numel for parameter in parameters(Glm4MoeConfig.from_dict(CONFIG)).values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    return {
        "config.json": json.dumps(CONFIG).encode(),
        INDEX: json.dumps(index).encode(),
        FIRST: shard(entries(shapes)),
        SHARD: shard(entries(last)),
    }


BASE = base()


def header_of(data: bytes) -> bytes:
    return data[8 : 8 + int.from_bytes(data[:8], "little")]


Case = tuple[Callable[[Files], object], str]


def whole(data: bytes | Callable[[bytes], bytes]) -> Callable[[Files], object]:
    """Other bytes for the second shard."""
    return lambda files: files.update({SHARD: data(files[SHARD]) if callable(data) else data})


def text(change: Callable[[bytes], bytes]) -> Callable[[Files], object]:
    """Another header for the second shard, before the same data."""
    return whole(lambda data: shard(change(header_of(data)), data[8 + len(header_of(data)) :]))


def table(change: Callable[[Header], object]) -> Callable[[Files], object]:
    """A header whose table was changed."""

    def apply(header: bytes) -> bytes:
        found = json.loads(header)
        change(found)
        return json.dumps(found).encode()

    return text(apply)


def field(name: str, **values: object) -> Callable[[Files], object]:
    return table(lambda header: header[name].update(values))


def renamed(name: str) -> Callable[[Files], object]:
    return table(lambda header: header.update({name: header.pop(NORM)}))


def both(*changes: Callable[[Files], object]) -> Callable[[Files], object]:
    return lambda files: [change(files) for change in changes]


HEADERS: Mapping[str, Case] = {
    "empty file": (whole(b""), "is 0 bytes long, expected a safetensors file"),
    "seven bytes": (whole(b"1234567"), "is 7 bytes long, expected a safetensors file"),
    "no header": (whole(bytes(8)), "does not start with '{'"),
    "header longer than the file": (whole(lambda d: d[:20]), "truncated: is 20 bytes long, its header alone needs"),
    "header of 2^63 bytes": (
        whole((2**63).to_bytes(8, "little") + b"{}"),
        "announces a 9223372036854775808-byte header",
    ),
    "header over the limit": (
        whole((25_000_001).to_bytes(8, "little") + b"{}"),
        "announces a 25000001-byte header, more",
    ),
    "data cut off": (whole(lambda d: d[:-1]), "truncated: is"),
    "a byte too many": (whole(lambda d: d + b"x"), "bytes long, expected"),
    "zip archive": (whole(b"PK\x03\x04" + bytes(40)), "announces a 67324752-byte header"),
    "pickle": (whole(b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19."), "announces a"),
    "GGUF": (whole(b"GGUF\x03\x00\x00\x00" + bytes(40)), "announces a"),
    "git LFS pointer": (whole(b"version https://git-lfs.github.com/spec/v1\n"), "announces a"),
    "space before the header": (text(lambda h: b" " + h), "does not start with '{'"),
    "byte order mark": (text(lambda h: b"\xef\xbb\xbf" + h), "does not start with '{'"),
    "header is a list": (text(lambda h: b"[" + h + b"]"), "does not start with '{'"),
    "header cut off": (text(lambda h: h[:-1]), "not valid JSON"),
    "two headers": (text(lambda h: h + h), "not valid JSON"),
    "NUL after the header": (text(lambda h: h + b"\0"), "not valid JSON"),
    "comment": (text(lambda h: b"{/**/" + h[1:]), "not valid JSON"),
    "bad UTF-8": (text(lambda h: h.replace(b"norm", b"n\xffrm")), "not valid JSON"),
    "lone surrogate": (text(lambda h: h.replace(b"norm", b"n\\ud800rm")), "is empty or not a plain name"),
    "nested 100,000 deep": (text(lambda h: b'{"a":' * 100_000), "nested too deeply"),
    "number of 5,000 digits": (field(NORM, shape=[10**4299]), "expected positive integers"),
    "duplicate name": (text(lambda h: h[:-1] + b"," + h[1:]), f"the key '{NORM}' appears twice"),
    "duplicate metadata": (text(lambda h: b'{"__metadata__": {}, "__metadata__": {}, ' + h[1:]), "appears twice"),
    "duplicate field": (text(lambda h: h.replace(b'"dtype"', b'"shape": [4], "dtype"', 1)), "'shape' appears twice"),
    "metadata of numbers": (table(lambda t: t.update(__metadata__={"a": 1})), "__metadata__ is not a table of strings"),
    "metadata that is a list": (table(lambda t: t.update(__metadata__=[])), "__metadata__ is not a table of strings"),
    "no tensors": (whole(shard({}, b"")), "has no tensors"),
    "data without tensors": (whole(shard({}, b"1234")), "has no tensors"),
    "empty name": (renamed(""), "the tensor name '' is empty or not a plain name"),
    "NUL in a name": (renamed("a\0b"), "not a plain name"),
    "line feed in a name": (renamed("a\nb"), "not a plain name"),
    "terminal escape in a name": (renamed("a\x1b[2Jb"), "not a plain name"),
    "name that leaves the folder": (renamed("../../etc/passwd"), "not a plain name"),
    "absolute name": (renamed("/etc/passwd"), "not a plain name"),
    "Windows path as a name": (renamed("..\\x"), "not a plain name"),
    "name of 10,000 letters": (renamed("a" * 10_000), "not a plain name"),
    "entry that is a number": (table(lambda t: t.update({NORM: 3})), f"{NORM} has fields []"),
    "entry that is null": (table(lambda t: t.update({NORM: None})), f"{NORM} has fields []"),
    "no dtype": (table(lambda t: t[NORM].pop("dtype")), f"{NORM} has fields ['data_offsets', 'shape']"),
    "no shape": (table(lambda t: t[NORM].pop("shape")), f"{NORM} has fields ['data_offsets', 'dtype']"),
    "no offsets": (table(lambda t: t[NORM].pop("data_offsets")), f"{NORM} has fields ['dtype', 'shape']"),
    "unknown field": (field(NORM, extra=1), f"{NORM} has fields ['data_offsets', 'dtype', 'extra'"),
    "unknown dtype": (field(NORM, dtype="Q4_K"), "unknown dtype 'Q4_K'"),
    "dtype in small letters": (field(NORM, dtype="bf16"), "unknown dtype 'bf16'"),
    "dtype that is a list": (field(NORM, dtype=["BF16"]), "unknown dtype ['BF16']"),
    "four-bit dtype": (field(NORM, dtype="F4", shape=[16]), "unknown dtype 'F4'"),
    "negative shape": (field(NORM, shape=[-4]), "has shape [-4], expected positive integers"),
    "two negative axes": (field(HEAD, shape=[-8, -4]), "has shape [-8, -4], expected positive integers"),
    "float in a shape": (field(NORM, shape=[4.0]), "has shape [4.0], expected positive integers"),
    "truth in a shape": (field(NORM, shape=[True, 4]), "has shape [True, 4], expected positive integers"),
    "NaN in a shape": (text(lambda h: h.replace(b'"shape": [4]', b'"shape": [NaN]')), "has shape [nan], expected"),
    "text as a shape": (field(NORM, shape="4"), "has shape '4', expected positive integers"),
    "shape of nine axes": (field(NORM, shape=[1] * 8 + [4]), "expected positive integers, at most 8"),
    "shape that wraps around": (field(NORM, shape=[2**32, 2**31, 4]), "its dtype and shape need"),
    "empty tensor": (
        table(lambda t: t.update(empty={"dtype": "BF16", "shape": [0, 4], "data_offsets": [8, 8]})),
        "has shape [0, 4], expected positive integers",
    ),
    "one element less": (field(NORM, shape=[3]), "has 8 bytes, its dtype and shape need 6"),
    "three offsets": (field(NORM, data_offsets=[0, 8, 8]), "expected two natural numbers"),
    "negative offset": (field(NORM, data_offsets=[-8, 0]), "expected two natural numbers"),
    "negative zero": (text(lambda h: h.replace(b"[0, 8]", b"[-0, 8]")), "expected two natural numbers"),
    "float offset": (field(NORM, data_offsets=[0, 8.0]), "expected two natural numbers"),
    "offset beyond 64 bits": (field(NORM, data_offsets=[2**64, 2**64 + 8]), "expected two natural numbers"),
    "offsets the wrong way around": (field(NORM, data_offsets=[8, 0]), "has -8 bytes"),
    "overlap": (field(HEAD, data_offsets=[4, 68]), f"{HEAD} overlaps the tensor before it"),
    "the same bytes twice": (
        table(lambda t: t.update(twin=dict(t[NORM]))),
        "overlaps the tensor before it",
    ),
    "hole": (
        both(field(HEAD, data_offsets=[12, 76]), whole(lambda d: d + bytes(4))),
        "leaves a hole",
    ),
    "hole at the start": (table(lambda t: t.pop(NORM)), f"{HEAD} leaves a hole before it"),
    "range past the end": (whole(lambda d: shard(json.loads(header_of(d)), bytes(40))), "truncated: is"),
    "metadata of 400,000 keys": (
        text(lambda h: b'{"__metadata__": {' + b",".join(b'"%d":""' % i for i in range(400_000)) + b"}, " + h[1:]),
        "holds far more than it should",
    ),
    "a million lists": (text(lambda h: b'{"a": [' + b"[]," * 1_000_000 + b"0], " + h[1:]), "holds far more than it"),
    "too many tensors": (
        whole(shard(b"{" + b",".join(b'"%d":{"data_offsets":[0,0]}' % i for i in range(150_001)) + b"}")),
        "has more than 150000 tensors",
    ),
}


LIBRARY = {
    *("duplicate name", "space before the header", "empty name", "NUL in a name"),
    *("line feed in a name", "terminal escape in a name", "name that leaves the folder", "absolute name"),
    *("Windows path as a name", "name of 10,000 letters", "unknown field", "empty tensor", "four-bit dtype"),
    *("shape of nine axes", "no tensors", "metadata of 400,000 keys"),
}


def index(change: Callable[[dict[str, Any]], object]) -> Callable[[Files], object]:
    def apply(files: Files) -> None:
        found = json.loads(files[INDEX])
        change(found)
        files[INDEX] = json.dumps(found).encode()

    return apply


def maps_to(file: object) -> Callable[[Files], object]:
    return index(lambda t: t["weight_map"].update({NORM: file}))


INDICES: Mapping[str, Case] = {
    "index cut off": (lambda f: f.update({INDEX: f[INDEX][:-5]}), "not valid JSON"),
    "index that is a list": (lambda f: f.update({INDEX: b"[]"}), "holds a JSON list, expected an object"),
    "empty index": (lambda f: f.update({INDEX: b""}), "not valid JSON"),
    "index without a map": (index(lambda t: t.pop("weight_map")), "has no weight_map"),
    "map without entries": (index(lambda t: t["weight_map"].clear()), "has no weight_map"),
    "map that is a list": (index(lambda t: t.update(weight_map=[SHARD])), "has no weight_map"),
    "duplicate key in the map": (
        lambda f: f.update({INDEX: f[INDEX].replace(b'"lm_head.weight"', b'"lm_head.weight": "a", "lm_head.weight"')}),
        "the key 'lm_head.weight' appears twice",
    ),
    "index of a million objects": (
        lambda f: f.update({INDEX: b'{"metadata": [' + b"{}," * 1_000_000 + b'0], "weight_map": {}}'}),
        "holds far more than it should",
    ),
    "empty name in the map": (index(lambda t: t["weight_map"].update({"": SHARD})), "tensor name '' is empty"),
    "file above the folder": (maps_to("../model.safetensors"), "expected a plain file name"),
    "absolute file": (maps_to("/etc/model.safetensors"), "expected a plain file name"),
    "file in a folder": (maps_to("sub/model.safetensors"), "expected a plain file name"),
    "Windows path to a file": (maps_to("C:\\model.safetensors"), "expected a plain file name"),
    "NUL in a file name": (maps_to("a\0.safetensors"), "expected a plain file name"),
    "address of a file": (maps_to("https://x/model.safetensors"), "expected a plain file name"),
    "dots as a file": (maps_to(".."), "expected a plain file name"),
    "pickle in the map": (maps_to("pytorch_model.bin"), "expected a plain file name ending in .safetensors"),
    "number as a file": (maps_to(2), "is in 2, expected a plain file name"),
    "list as a file": (maps_to([SHARD]), "expected a plain file name"),
    "missing shard": (lambda f: f.pop(SHARD), f"1 of 2 shards missing ({SHARD}); finish the download"),
    "tensor in another shard": (maps_to(FIRST), f"{NORM} is in {SHARD}, not in {FIRST} as the index says"),
    "tensor that nobody has": (
        index(lambda t: t["weight_map"].update(ghost=SHARD)),
        "ghost is in the index but not in",
    ),
    "tensor that is not listed": (
        index(lambda t: t["weight_map"].pop(NORM)),
        f"{NORM} is in {SHARD} but not in the index",
    ),
    "tensor in two shards": (lambda f: f.update({"z.safetensors": f[SHARD]}), "is stored in both"),
    "stranger outside the index": (
        lambda f: f.update({"z.safetensors": shard(entries({"extra": (4,)}))}),
        "extra in z.safetensors, which the index does not list",
    ),
    "malformed stranger": (lambda f: f.update({"z.safetensors": b"junk"}), "z.safetensors: is 4 bytes long"),
    "another total size": (index(lambda t: t["metadata"].update(total_size=1)), "total_size is 1, but the shards hold"),
    "total size that is a text": (index(lambda t: t["metadata"].update(total_size="1")), "total_size is '1', expected"),
    "metadata that is a text": (index(lambda t: t.update(metadata="x")), "metadata is 'x', expected a table"),
    "no index": (lambda f: f.pop(INDEX), f"neither {INDEX} nor model.safetensors; copy the index as well"),
    "only pickles": (
        lambda f: [f.pop(name) for name in (INDEX, FIRST, SHARD)] and f.update({"pytorch_model.bin": b"\x80\x02."}),
        "such files can run code when loaded and are never opened, so convert",
    ),
}


def config(**changes: object) -> Callable[[Files], object]:
    return lambda files: files.update({"config.json": json.dumps(CONFIG | changes).encode()})


def raw(data: bytes) -> Callable[[Files], object]:
    return lambda files: files.update({"config.json": data})


def without(key: str) -> Callable[[Files], object]:
    return raw(json.dumps({name: value for name, value in CONFIG.items() if name != key}).encode())


CONFIGS: Mapping[str, Case] = {
    "no config": (lambda f: f.pop("config.json"), "config.json: can not be read (No such file or directory)"),
    "empty config": (raw(b""), "not valid JSON"),
    "config that is a list": (raw(b"[1]"), "holds a JSON list, expected an object"),
    "config in UTF-16": (raw(json.dumps(CONFIG).encode("utf-16")), "not valid JSON"),
    "config with a key twice": (raw(b'{"a": 1, "a": 2}'), "the key 'a' appears twice"),
    "config nested 100,000 deep": (raw(b'{"a":' * 100_000), "nested too deeply"),
    "config with an endless number": (raw(b'{"vocab_size": ' + b"9" * 5000 + b"}"), "not valid JSON"),
    "no model type": (without("model_type"), "model_type is None"),
    "another model": (config(model_type="glm4_moe_lite"), "GLM-4.7-Flash"),
    "another class": (config(architectures=["Glm4MoeModel"]), "use that class"),
    "missing size": (without("head_dim"), "missing key head_dim"),
    "unknown key": (config(n_group_size=3), "unknown key 'n_group_size'"),
    "text for a number": (config(vocab_size="8"), "vocab_size is '8', expected an integer"),
    "truth for a number": (config(vocab_size=True), "vocab_size is True, expected an integer"),
    "float for an integer": (config(vocab_size=8.0), "vocab_size is 8.0, expected an integer"),
    "negative size": (config(hidden_size=-4), "hidden_size is -4, expected 1 to"),
    "size of 2^63": (config(hidden_size=2**63), "hidden_size is 9223372036854775808, expected 1 to"),
    "a million layers": (config(num_hidden_layers=10**6), "num_hidden_layers is 1000000, expected 1 to 4096"),
    "layers that are not there": (config(num_hidden_layers=4096, num_nextn_predict_layers=0), "more than 1000 tensors"),
    "experts that are not there": (
        config(num_hidden_layers=4096, first_k_dense_replace=0, n_routed_experts=4096),
        "more than 1000 tensors not as config.json asks",
    ),
    "epsilon that is NaN": (raw(json.dumps(CONFIG | {"rms_norm_eps": float("nan")}).encode()), "expected a finite"),
    "epsilon of zero": (config(rms_norm_eps=0.0), "rms_norm_eps is 0.0, expected a positive number"),
    "heads that do not divide": (config(num_attention_heads=3, num_key_value_heads=2), "does not divide"),
    "odd rotary size": (config(partial_rotary_factor=0.3), "rotates 1 elements, expected an even number"),
    "rotary factor beyond all": (config(partial_rotary_factor=1e308), "partial_rotary_factor is 1e+308, expected at"),
    "scaled RoPE": (config(rope_scaling={"type": "yarn", "factor": 4}), "only the default RoPE"),
    "two values for one thing": (config(num_local_experts=3), "n_routed_experts is 2 but num_local_experts says 3"),
    "stop token outside": (config(eos_token_id=[8]), "eos_token_id is 8, expected an id from 0"),
    "other sizes than the weights": (config(vocab_size=16), "has shape [8, 4], expected [16, 4]"),
    "unknown quantization": (config(quantization_config={"quant_method": "gptq"}), "quant_method is 'gptq', but only"),
    "quantization of nothing": (config(quantization_config={"quant_method": "fp8"}), "but no weight is FP8; remove it"),
    "quantization that is a text": (config(quantization_config="fp8"), "is 'fp8', expected an object"),
    "ModelOpt's file cut off": (lambda f: f.update({HF_QUANT_CONFIG: b"{"}), "not valid JSON"),
    "ModelOpt's file without its table": (lambda f: f.update({HF_QUANT_CONFIG: b"{}"}), "no table 'quantization'"),
}

CASES = {**HEADERS, **INDICES, **CONFIGS}


def written(files: Files, directory: Path) -> Path:
    directory.mkdir()
    for name, data in files.items():
        (directory / name).write_bytes(data)
    return directory


def test_there_are_many_classes_and_the_base_is_well_formed(tmp_path: Path) -> None:
    assert len(HEADERS) + len(INDICES) + len(CONFIGS) == len(CASES) >= 120
    assert set(HEADERS) >= LIBRARY
    checkpoint = Checkpoint.open(written(BASE, tmp_path / "base"))
    for parameter in parameters(checkpoint.config).values():
        assert not checkpoint.read(parameter).any()


@pytest.mark.parametrize("name", CASES)
def test_malformed(name: str, tmp_path: Path) -> None:
    change, sentence = CASES[name]
    files = dict(BASE)
    change(files)
    assert files != BASE
    found = refused(3, "build", written(files, tmp_path / "checkpoint"), "-o", tmp_path / "out")
    assert sentence in found
    assert len(found) < 3000
    assert found.endswith(".")
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("name", HEADERS)
def test_what_the_library_makes_of_it(name: str, tmp_path: Path) -> None:
    files = dict(BASE)
    HEADERS[name][0](files)
    path = tmp_path / "shard.safetensors"
    path.write_bytes(files[SHARD])
    try:
        with safe_open(path, framework="numpy") as file:
            list(file.keys())
        taken = True
    except (SafetensorError, OSError, ValueError):
        taken = False
    assert taken == (name in LIBRARY)


def fifo(path: Path) -> None:
    os.mkfifo(path)


def link_to(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


def sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(2**40)


KINDS: Mapping[str, tuple[Callable[[Path], None], str]] = {
    "FIFO": (fifo, "not a regular file"),
    "folder": (Path.mkdir, "not a regular file"),
    "endless device": (link_to("/dev/zero"), "not a regular file"),
    "terminal": (link_to("/dev/tty"), "not a regular file"),
    "link to nowhere": (link_to("nowhere"), "can not be read (No such file or directory)"),
    "link to itself": (lambda path: path.symlink_to(path.name), "can not be read"),
    "terabyte of zeros": (sparse, ""),
}


@pytest.mark.parametrize("file", ["config.json", HF_QUANT_CONFIG, INDEX, SHARD, "z.safetensors"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_file(kind: str, file: str, tmp_path: Path) -> None:
    make, sentence = KINDS[kind]
    directory = written({name: data for name, data in BASE.items() if name != file}, tmp_path / "checkpoint")
    make(directory / file)
    if kind == "terabyte of zeros":
        sentence = "is 1099511627776 bytes long, more than" if file.endswith(".json") else "does not start with '{'"
    found = refused(3, "build", directory, "-o", tmp_path / "out")
    assert sentence in found


def test_links_to_regular_files_are_read(tmp_path: Path) -> None:
    """As in the Hugging Face cache: names that point to blobs elsewhere, one link after the other."""
    blobs = written(BASE, tmp_path / "blobs")
    snapshot = tmp_path / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    for name in BASE:
        (tmp_path / f"link-{name}").symlink_to(blobs / name)
        (snapshot / name).symlink_to(f"../../link-{name}")
    (tmp_path / "latest").symlink_to(snapshot)
    assert Checkpoint.open(tmp_path / "latest").identity() == Checkpoint.open(blobs).identity()
