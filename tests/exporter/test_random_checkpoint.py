import dataclasses
import json
import subprocess
import sys

import pytest
import torch
import transformers

from glm_export.exporter.layout import mtp_parameters, parameters, parts
from glm_export.exporter.random_checkpoint import make_tokenizer, write_random_checkpoint
from glm_export.exporter.recipe import load_recipe
from glm_export.exporter.source.checkpoint import Checkpoint
from glm_export.exporter.source.shards import INDEX, SINGLE
from glm_export.runtime.errors import ResourceError, UsageError

TINY = load_recipe("tiny").model


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("random") / "checkpoint"
    write_random_checkpoint(TINY, path, shard_bytes=200_000)
    return path


@pytest.fixture(scope="module")
def model(directory):
    found, report = transformers.Glm4MoeForCausalLM.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["mismatched_keys"]
    assert all(name.startswith("model.layers.4.") for name in report["unexpected_keys"])
    return found


def files(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


def test_is_what_the_config_asks_for(directory):
    checkpoint = Checkpoint.open(directory)
    assert checkpoint.config == TINY
    expected = {name for parameter in mtp_parameters(TINY).values() for name in parts(parameter)}
    assert set(checkpoint.mtp_tensors) == expected
    assert len(list(directory.glob("*.safetensors"))) > 3
    for parameter in parameters(TINY).values():
        tensor = checkpoint.read(parameter)
        assert tensor.dtype == (torch.float32 if parameter.kind == "router_bias" else torch.bfloat16)
        assert tensor.isfinite().all()
        assert tensor.count_nonzero() > 0.9 * tensor.numel()


def test_activations_and_logits_stay_near_one_and_tokens_spread(model):
    chosen = []
    hooks = [
        layer.mlp.gate.register_forward_hook(lambda module, args, result: chosen.append(result))
        for layer in model.model.layers[1:]
    ]
    ids = torch.randint(0, TINY.vocab_size, (4, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        result = model(ids, output_hidden_states=True)
    for hook in hooks:
        hook.remove()
    assert all(0.5 < hidden.std() < 3 for hidden in result.hidden_states)
    assert 0.5 < result.logits.std() < 2
    for _, _, expert_ids in chosen:
        counts = torch.bincount(expert_ids.flatten(), minlength=TINY.n_routed_experts)
        assert counts.min() > counts.float().mean() / 4


def test_is_deterministic_and_seeded(directory, tmp_path):
    write_random_checkpoint(TINY, tmp_path / "same", shard_bytes=200_000)
    assert files(tmp_path / "same") == files(directory)
    write_random_checkpoint(TINY, tmp_path / "other", shard_bytes=200_000, seed=1)
    differing = {name for name, data in files(tmp_path / "other").items() if data != files(directory)[name]}
    assert differing == {path.name for path in directory.glob("*.safetensors")}


def test_packed_single_file_holds_the_same_values(directory, tmp_path):
    write_random_checkpoint(TINY, tmp_path / "packed", packed=True, mtp=False, tokenizer=False)
    assert {path.name for path in (tmp_path / "packed").iterdir()} == {SINGLE, "config.json", "generation_config.json"}
    ours, packed = Checkpoint.open(directory), Checkpoint.open(tmp_path / "packed")
    assert packed.config == dataclasses.replace(TINY, num_nextn_predict_layers=0)
    assert packed.mtp_tensors == {}
    for parameter in parameters(TINY).values():
        assert torch.equal(ours.read(parameter), packed.read(parameter))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_other_dtypes(tmp_path, dtype):
    write_random_checkpoint(TINY, tmp_path, dtype=dtype, tokenizer=False)
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.config.dtype == dtype
    assert checkpoint.source_dtype(parameters(TINY)["lm_head.weight"]) == getattr(torch, dtype)


def test_index_and_generation_config(directory):
    index = json.loads((directory / INDEX).read_text())
    stored = sum(
        tensor.end - tensor.start for shard in Checkpoint.open(directory).shards for tensor in shard.tensors.values()
    )
    assert index["metadata"]["total_size"] == stored
    generation = json.loads((directory / "generation_config.json").read_text())
    assert generation == {"eos_token_id": [400, 407, 409], "pad_token_id": 400}


def test_tokenizer_and_template(directory):
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    text = "Where can the water find its way? Überall! \U0001f30a \u4f60\u597d\n\tx"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert not set(ids) & set(range(400, 436))  # the special tokens
    assert len(tokenizer(" they would")["input_ids"]) == 2
    chat = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]
    chat += [{"role": "assistant", "content": "A"}, {"role": "tool", "content": "T"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == (
        "[gMASK]<sop><|system|>\nS<|user|>\nU<|assistant|>\n<think></think>\nA"
        "<|observation|>\n<tool_response>\nT\n</tool_response><|assistant|>"
    )
    off = tokenizer.apply_chat_template(chat[1:2], tokenize=False, add_generation_prompt=True, enable_thinking=False)
    assert off == "[gMASK]<sop><|user|>\nU/nothink<|assistant|>\n<think></think>"
    special = tokenizer(off, add_special_tokens=False)["input_ids"]
    assert special[:3] == [402, 404, 407]


def test_tokenizer_has_the_ids_of_the_released_models():
    tokenizer = make_tokenizer(load_recipe("glm-4.7-fp8").model)
    expected = {"<|endoftext|>": 151329, "[gMASK]": 151331, "<sop>": 151333, "<|user|>": 151336}
    expected |= {"<|assistant|>": 151337, "<|observation|>": 151338, "<think>": 151350, "</think>": 151351}
    expected |= {"/nothink": 151360, "<|video|>": 151364}
    assert {name: tokenizer.token_to_id(name) for name in expected} == expected


@pytest.mark.parametrize(
    ("vocab_size", "eos", "bos", "pad"),
    [(320, (0,), None, 0), (320, (319, 5, 100), 7, 9), (320, (), None, None), (400, (1, 2, 3, 4, 5), 6, 399)],
)
def test_tokenizer_of_any_vocabulary(vocab_size, eos, bos, pad):
    config = dataclasses.replace(TINY, vocab_size=vocab_size, eos_token_id=eos, bos_token_id=bos, pad_token_id=pad)
    tokenizer = make_tokenizer(config)
    vocab = tokenizer.get_vocab()
    assert sorted(set(vocab.values())) == sorted(vocab.values())
    assert max(vocab.values()) < vocab_size
    special = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    assert special >= {i for i in (*eos, bos, pad) if i is not None}
    assert [tokenizer.id_to_token(i) for i in eos[:3]] == ["<|endoftext|>", "<|user|>", "<|observation|>"][: len(eos)]
    text = "the \x00 \xff \u20ac"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_refusals(tmp_path, monkeypatch):
    small = dataclasses.replace(TINY, vocab_size=280, eos_token_id=(0,), pad_token_id=None)
    with pytest.raises(UsageError, match="vocab_size is 280, but a tokenizer needs 292"):
        write_random_checkpoint(small, tmp_path / "new")
    with pytest.raises(UsageError, match="dtype is 'int8', expected one of bfloat16, float16, float32"):
        write_random_checkpoint(TINY, tmp_path / "new", dtype="int8")
    with pytest.raises(UsageError, match="seed is -1"):
        write_random_checkpoint(TINY, tmp_path / "new", seed=-1)
    assert not (tmp_path / "new").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(UsageError, match="is not an empty folder"):
        write_random_checkpoint(TINY, tmp_path / "full")
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(ResourceError, match="has 1000 free"):
        write_random_checkpoint(TINY, tmp_path / "new")


def test_memory_does_not_grow_with_the_tensor(tmp_path):
    code = f"""
import dataclasses, resource
from glm_export.exporter.random_checkpoint import write_random_checkpoint
from glm_export.exporter.recipe import load_recipe

peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
config = dataclasses.replace(load_recipe("tiny").model, vocab_size=1 << 19, hidden_size=128)
before = peak()
write_random_checkpoint(config, {str(tmp_path)!r}, dtype="float32", tokenizer=False)
print(peak() - before)
"""
    grown = int(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
    assert (tmp_path / SINGLE).stat().st_size > 1 << 29
    assert grown < 120_000  # kB; the embedding alone has 256 MiB
