"""What is wrong with a checkpoint, config, argument or bundle is said in one sentence, with the exit code for it.

Nothing is left behind that looks like a bundle.
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import filelock
import pytest
import torch
from cli_tools import bundle, call, checkpoint, copied, refused
from safetensors.torch import load_file, save_file

from glm_export.runtime.files import sha256_of
from glm_export.runtime.manifest import sealed

Break = Callable[[Path], object]

Q = "model.layers.0.self_attn.q_proj.weight"


def tiny_build(source: object, out: Path, *more: object) -> list[object]:
    return ["build", source, "-o", out, "--recipe", "tiny", *more]


def refused_build(code: int, command: list[object], out: Path) -> str:
    """As `refused`, and neither a bundle nor something that could be taken for one is there afterwards."""
    sentence = refused(code, *command)
    assert not out.exists()
    assert not list(out.parent.glob(f"{out.name}*/manifest.json"))
    return sentence


# Checkpoints


def shard_of(directory: Path, name: str) -> Path:
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    return directory / index["weight_map"][name]


def truncate(path: Path, by: int = 1000) -> None:
    os.truncate(path, path.stat().st_size - by)


def change_tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> Break:
    def apply(directory: Path) -> None:
        shard = shard_of(directory, name)
        tensors = {key: value.clone() for key, value in load_file(shard).items()}
        changed = change(tensors.pop(name))
        save_file(tensors if changed is None else tensors | {name: changed}, shard)

    return apply


def put(value: float) -> Break:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor[1, 2] = value
        return tensor

    return change_tensor(Q, change)


def extra_shard(directory: Path) -> None:
    save_file({"model.layers.0.surprise.weight": torch.zeros(2)}, directory / "model-00009.safetensors")


def index(change: Callable[[dict[str, str]], object]) -> Break:
    def apply(directory: Path) -> None:
        path = directory / "model.safetensors.index.json"
        table = json.loads(path.read_text())
        change(table["weight_map"])
        path.write_text(json.dumps(table))

    return apply


def pickle_only(directory: Path) -> None:
    for path in directory.glob("*.safetensors*"):
        path.unlink()
    (directory / "pytorch_model.bin").write_bytes(b"\x80\x02.")


def no_weights(directory: Path) -> None:
    for path in directory.glob("*.safetensors*"):
        path.unlink()


def write(name: str, data: bytes) -> Break:
    return lambda directory: (directory / name).write_bytes(data)


def remove(name: str) -> Break:
    return lambda directory: (directory / name).unlink()


def config(**changes: object) -> Break:
    """Changes keys of config.json; None removes one."""

    def apply(directory: Path) -> None:
        table = json.loads((directory / "config.json").read_text()) | changes
        table = {key: value for key, value in table.items() if value is not None}
        (directory / "config.json").write_text(json.dumps(table))

    return apply


SHARD = "model-00002-of-00003.safetensors"

CHECKPOINTS: Mapping[str, tuple[Break, str]] = {
    "truncated shard": (lambda d: truncate(d / SHARD), "truncated"),
    "empty shard": (write(SHARD, b""), "is 0 bytes long"),
    "shard that is no safetensors": (write(SHARD, b"PK\x03\x04" * 99), "header"),
    "missing shard": (remove(SHARD), "1 of 3 shards missing"),
    "extra shard": (extra_shard, "the index does not list"),
    "the same shard twice": (lambda d: shutil.copy(d / SHARD, d / "copy.safetensors"), "is stored in both"),
    "missing tensor": (change_tensor(Q, lambda t: None), f"{Q} is in the index but not in"),
    "tensor of another shape": (change_tensor(Q, lambda t: t[:-1].clone()), "has shape [63, 64], expected [64, 64]"),
    "tensor of another dtype": (change_tensor(Q, lambda t: t.to(torch.int32)), "is I32, expected one of"),
    "index with a path": (index(lambda m: m.update({Q: "../x.safetensors"})), "expected a plain file name"),
    "index without entries": (index(lambda m: m.clear()), "has no weight_map"),
    "index that is cut off": (write("model.safetensors.index.json", b'{"weight_map": {'), "not valid JSON"),
    "shards without an index": (remove("model.safetensors.index.json"), "copy the index as well"),
    "only pickles": (pickle_only, "can run code"),
    "no weights at all": (no_weights, "has no weights"),
    "no config": (remove("config.json"), "config.json: can not be read"),
    "config that is no JSON": (write("config.json", b'{"model_type": '), "not valid JSON"),
    "config that is a list": (write("config.json", b"[]"), "expected an object"),
    "config that is not UTF-8": (write("config.json", b'{"model_type": "\xff"}'), "not valid JSON"),
    "config with a key twice": (write("config.json", b'{"a": 1, "a": 2}'), "appears twice"),
    "GLM-4.7-Flash": (config(model_type="glm4_moe_lite"), "GLM-4.7-Flash"),
    "GLM-4.5V": (config(model_type="glm4v_moe"), "a vision-language model"),
    "dense GLM-4": (config(model_type="glm4"), "a dense GLM-4"),
    "another family": (config(model_type="llama"), "expected 'glm4_moe'"),
    "another class": (config(architectures=["Glm4MoeModel"]), "use that class"),
    "another quantization": (config(quantization_config={"quant_method": "awq"}), "quant_method is 'awq', but only"),
    "FP8 that is none": (config(quantization_config={"quant_method": "fp8"}), "but no weight is FP8"),
    "config without head_dim": (config(head_dim=None), "missing key head_dim"),
    "config with an unknown key": (config(n_group_size=3), "unknown key 'n_group_size'"),
    "config with a text for a number": (config(num_hidden_layers="4"), "num_hidden_layers is '4', expected an integer"),
    "config with too many layers": (config(num_hidden_layers=10**9), "num_hidden_layers is 1000000000"),
    "heads that do not divide": (config(num_key_value_heads=3), "does not divide"),
    "scaled RoPE": (config(rope_scaling={"type": "yarn", "factor": 4}), "only the default RoPE"),
    "more groups kept than there are": (config(topk_group=3), "topk_group 3 is more than n_group 2"),
    "another activation": (config(hidden_act="gelu"), "hidden_act is 'gelu'"),
    "other sizes than the weights": (config(hidden_size=128), "expected [512, 128]"),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoint(name: str, tmp_path: Path) -> None:
    damage, sentence = CHECKPOINTS[name]
    damage(copied(checkpoint(), tmp_path / "checkpoint"))
    found = refused_build(3, ["build", tmp_path / "checkpoint", "-o", tmp_path / "out"], tmp_path / "out")
    assert sentence in found
    assert not list(tmp_path.glob("out*"))


VALUES: Mapping[str, tuple[Break, str, str]] = {
    "NaN": (put(float("nan")), "fp8", f"{Q}[1, 2] is nan"),
    "infinity": (put(float("inf")), "bf16", f"{Q}[1, 2] is inf"),
    "too large for fp16": (put(1e6), "fp16", "too large for torch.float16"),
    "stop ids beyond the vocabulary": (write("generation_config.json", b'{"eos_token_id": 512}'), "bf16", "below 512"),
}


@pytest.mark.parametrize("name", VALUES)
def test_what_only_shows_while_building(name: str, tmp_path: Path) -> None:
    damage, precision, sentence = VALUES[name]
    damage(copied(checkpoint(), tmp_path / "checkpoint"))
    command = tiny_build(tmp_path / "checkpoint", tmp_path / "out", "--layers", 1, "--precision", precision)
    assert sentence in refused_build(3, command, tmp_path / "out")
    (left,) = tmp_path.glob("out.building-*")
    assert "did not finish" in refused(3, "run", left, "--ids", 1)
    assert "did not finish" in refused(3, "verify", left)


@pytest.mark.parametrize("kind", ["missing", "file"])
def test_checkpoint_that_is_no_folder(kind: str, tmp_path: Path) -> None:
    if kind == "file":
        (tmp_path / "checkpoint").write_text("")
    command = ["build", tmp_path / "checkpoint", "-o", tmp_path / "out"]
    assert "is no folder" in refused_build(3, command, tmp_path / "out")


# Arguments of build and make-checkpoint

BUILD_ARGUMENTS: Mapping[str, tuple[int, tuple[object, ...], str]] = {
    "recipe that does not exist": (2, ("--recipe", "tinny"), "'tinny' (did you mean 'tiny'?)"),
    "recipe file that does not exist": (2, ("--recipe", "no/such.toml"), "can not be read"),
    "key that does not exist": (2, ("--set", "runtime.capcity=9"), "did you mean 'capacity'?"),
    "value of another type": (2, ("--set", "runtime.capacity=many"), "runtime.capacity is 'many', expected an integer"),
    "value without a key": (2, ("--set", "capacity"), "is not of the form path.to.key=value"),
    "value for a table": (2, ("--set", "runtime=3"), "runtime is 3, expected a table"),
    "precision that does not exist": (2, ("--precision", "fp9"), "'fp9' is not one of"),
    "precision set to nonsense": (2, ("--set", "precision=fp9"), "precision is 'fp9' (did you mean 'fp8'?)"),
    "target that does not exist": (2, ("--target", "openvino"), "'openvino' is not one of"),
    "engine of which nothing is left": (2, ("--target", "tensorrt-rtx", "--no-weights"), "leaves nothing to build"),
    "engine of attentions": (2, ("--target", "tensorrt-rtx", "--outputs", "attentions"), "does not compute"),
    "engine in fp32": (6, ("--target", "tensorrt-rtx", "-p", "fp32"), "has no float32 experts"),
    "FP8 on a GPU without it": (6, ("--target", "tensorrt-rtx", "--sm", "89,86"), "8.6 is asked, FP8 needs 8.9"),
    "GPU too old for the kernels": (6, ("--target", "tensorrt-rtx", "-p", "fp16", "--sm", "75"), "need 8.0"),
    "GPU that does not exist": (2, ("--target", "tensorrt-rtx", "--sm", "88"), "'8.8' (did you mean '8.9'?)"),
    "GPU that is no number": (2, ("--target", "tensorrt-rtx", "--sm", "ada"), "has 'ada'"),
    "GPU twice": (2, ("--target", "tensorrt-rtx", "--sm", "89,8.9"), "each once"),
    "no GPU at all": (2, ("--target", "tensorrt-rtx", "--sm", ""), "name one or more"),
    "GPU for a target without a choice": (2, ("--sm", "89"), "--sm is for the target tensorrt-rtx"),
    "TensorRT's experts in fp8": (2, ("--target", "tensorrt-rtx", "--set", "engine.experts=trt_moe"), "not in fp8"),
    "TensorRT's experts without its GPU": (
        6,
        ("--target", "tensorrt-rtx", "-p", "bf16", "--set", "engine.experts=trt_moe"),
        "needs the target tensorrt and compute capability 10.0",
    ),
    "prefill 0": (2, ("--set", "engine.prefill=0"), "engine.prefill is 0"),
    "cache dtype that does not exist": (2, ("--set", "engine.cache_dtype=fp4"), "did you mean 'fp8'?"),
    "capacity 0": (2, ("--capacity", 0), "0 is not in the range x>=1"),
    "capacity that is no number": (2, ("--capacity", "4k"), "'4k' is not a valid integer"),
    "batch 0": (2, ("--max-batch", 0), "0 is not in the range x>=1"),
    "capacity below the validation's need": (2, ("--capacity", 8), "more than runtime.capacity"),
    "no layers": (2, ("--layers", 0), "0 is not in the range x>=1"),
    "more layers than there are": (2, ("--layers", 5), "can not keep 5 of 4 layers"),
    "output that does not exist": (2, ("--outputs", "logits"), "export.outputs"),
    "option that does not exist": (2, ("--precison", "fp8"), "'--precision'"),
    "recipe of another model": (3, ("--recipe", "glm-4.5-air-fp8"), "is not the model of recipe glm-4.5-air-fp8"),
}


@pytest.mark.parametrize("name", BUILD_ARGUMENTS)
def test_build_argument(name: str, tmp_path: Path) -> None:
    code, arguments, sentence = BUILD_ARGUMENTS[name]
    found = refused_build(code, tiny_build(checkpoint(), tmp_path / "out", *arguments), tmp_path / "out")
    assert sentence in found
    assert not list(tmp_path.iterdir())


OTHER_ARGUMENTS: Mapping[str, tuple[int, tuple[object, ...], str]] = {
    "command that does not exist": (2, ("biuld",), "Did you mean 'build'?"),
    "no command": (2, ("--debug",), "Missing command"),
    "no checkpoint": (2, ("build", "-o", "OUT"), "CKPT is missing"),
    "no output": (2, ("build", "CKPT"), "Missing option '-o'"),
    "nothing to trace": (2, ("build", "-o", "OUT", "--no-weights"), "has no architecture"),
    "table and key in it": (
        2,
        ("build", "CKPT", "-o", "OUT", "--set", "runtime=3", "--set", "runtime.batch=2"),
        "needs it to be a table",
    ),
    "no architecture": (2, ("make-checkpoint", "-o", "OUT"), "give either --recipe or --config"),
    "two architectures": (
        2,
        ("make-checkpoint", "-o", "OUT", "--recipe", "tiny", "--config", "config.json"),
        "give either --recipe or --config",
    ),
    "config that is missing": (3, ("make-checkpoint", "-o", "OUT", "--config", "c.json"), "c.json: can not be read"),
    "random weights of a dtype": (2, ("make-checkpoint", "-o", "OUT", "--dtype", "int8"), "'int8' is not one of"),
    "negative seed": (2, ("make-checkpoint", "-o", "OUT", "--seed", -1), "-1 is not in the range x>=0"),
}


@pytest.mark.parametrize("name", OTHER_ARGUMENTS)
def test_other_argument(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, arguments, sentence = OTHER_ARGUMENTS[name]
    assert sentence in refused(code, *(checkpoint() if each == "CKPT" else each for each in arguments))
    assert not list(tmp_path.iterdir())


def test_recipe_that_is_no_toml(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text("precision = ")
    command = tiny_build(checkpoint(), tmp_path / "out", "--recipe", tmp_path / "recipe.toml")
    assert "not valid TOML" in refused_build(2, command, tmp_path / "out")


# Places to write to


def test_output_that_exists(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("keep")
    assert "already exists" in refused(2, *tiny_build(checkpoint(), tmp_path / "out"))
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine"]
    assert "is not an empty folder" in refused(2, "make-checkpoint", "--recipe", "tiny", "-o", tmp_path / "out")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine"]


def test_output_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    sentence = refused(3, *tiny_build(checkpoint(), tmp_path / "file" / "out"))
    assert "file" in sentence
    assert "check the path" in sentence


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_output_that_may_not_be_written(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir(mode=0o500)
    command = tiny_build(checkpoint(), tmp_path / "mine" / "out")
    assert "Permission denied" in refused_build(3, command, tmp_path / "mine" / "out")


def test_disk_that_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    command = tiny_build(checkpoint(), tmp_path / "out")
    assert "free some space" in refused_build(5, command, tmp_path / "out")
    assert "make space" in refused(5, "make-checkpoint", "--recipe", "tiny", "-o", tmp_path / "random")


def test_locked_build(tmp_path: Path) -> None:
    with filelock.FileLock(tmp_path / "out.lock"):
        command = tiny_build(checkpoint(), tmp_path / "out")
        assert "Another process is building" in refused_build(7, command, tmp_path / "out")


# Prompts

RUNS: Mapping[str, tuple[int, tuple[object, ...], str]] = {
    "no prompt": (2, (), "There is no prompt"),
    "empty text": (3, ("--prompt", ""), "Prompt 0 is empty"),
    "empty list of ids": (3, ("--ids", "1", "--ids", ""), "Prompt 1 is empty"),
    "ids that are no integers": (2, ("--ids", "1,two"), "'1,two' is not a list of integers"),
    "ids with a hole": (2, ("--ids", "1,,2"), "is not a list of integers"),
    "id beyond the vocabulary": (3, ("--ids", "1,512"), "the token id 512, which is not in the vocabulary"),
    "negative id": (3, ("--ids=-1",), "the token id -1"),
    "prompt longer than the capacity": (5, ("--ids", ",".join(["1"] * 200)), "the session's capacity is 128"),
    "too many new tokens": (5, ("--ids", "1", "--max-new-tokens", 128), "the session's capacity is 128"),
    "prompt longer than the model": (3, ("--ids", ",".join(["1"] * 1024)), "the model has 1024 positions"),
    "no new tokens": (2, ("--ids", "1", "--max-new-tokens", 0), "0 is not in the range x>=1"),
    "capacity 0": (2, ("--ids", "1", "--capacity", 0), "0 is not in the range x>=1"),
    "capacity beyond the model": (2, ("--ids", "1", "--capacity", 1025), "it must be 1..1024"),
    "batch 0": (2, ("--ids", "1", "--batch", 0), "0 is not in the range x>=1"),
    "batch beyond reason": (2, ("--ids", "1", "--batch", 10**6), "it must be 1..65536"),
    "no threads": (2, ("--ids", "1", "--threads", 0), "0 is not in the range x>=1"),
    "target that does not exist": (2, ("--ids", "1", "--target", "tpu"), "'tpu' is not one of"),
    "target without an engine": (3, ("--ids", "1", "--target", "tensorrt"), "has no engine for tensorrt: add one"),
    "file of prompts that is missing": (3, ("--prompts-file", "no-such-file"), "no-such-file: No such file"),
    "second argument": (2, ("prompt",), "'prompt' is not '-'"),
    "text that is not UTF-8": (3, ("--prompt", b"\xff".decode("utf-8", "surrogateescape")), "is not UTF-8"),
    "logits into no folder": (
        3,
        ("--ids", "1", "--save-logits", "no-such-folder/x.npy"),
        "no-such-folder is no folder",
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_run(name: str) -> None:
    code, arguments, sentence = RUNS[name]
    assert sentence in refused(code, "run", bundle("fp32"), *arguments, "--json")


@pytest.mark.parametrize(("data", "sentence"), [(b"", "is empty"), (b"\xff\n", "is not UTF-8"), (b"a\n\n", "Prompt 1")])
def test_file_of_prompts(data: bytes, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "prompts").write_bytes(data)
    assert sentence in refused(3, "run", bundle("fp32"), "--prompts-file", tmp_path / "prompts")


# Bundles


def flip(name: str) -> Break:
    def apply(directory: Path) -> None:
        data = bytearray((directory / name).read_bytes())
        data[len(data) // 2] ^= 1
        (directory / name).write_bytes(data)

    return apply


def manifest(change: Callable[[dict[str, Any]], object]) -> Break:
    def apply(directory: Path) -> None:
        table = json.loads((directory / "manifest.json").read_text())
        change(table)
        (directory / "manifest.json").write_text(json.dumps(sealed(table)))

    return apply


def linked(name: str) -> Break:
    def apply(directory: Path) -> None:
        (directory / name).rename(directory.parent / "elsewhere")
        (directory / name).symlink_to(directory.parent / "elsewhere")

    return apply


def hard_linked(directory: Path) -> None:
    (directory.parent / "second").hardlink_to(directory / WEIGHTS)


def record(name: str) -> Break:
    """Makes the manifest agree with what is there."""

    def change(directory: Path) -> None:
        path = directory / name
        entry = {"size": path.stat().st_size, "sha256": sha256_of(path)}
        manifest(lambda table: table["files"].update({name: entry}))(directory)

    return change


def both(*steps: Break) -> Break:
    def apply(directory: Path) -> None:
        for step in steps:
            step(directory)

    return apply


def unfinished(directory: Path) -> None:
    (directory / "manifest.json").unlink()
    (directory / "journal.json").write_text('{"key": "", "files": {}}')


WEIGHTS = "weights/layer-001.safetensors"

BUNDLES: Mapping[str, tuple[int, Break, str]] = {
    "flipped byte in the graph": (8, flip("model.onnx"), "has sha256"),
    "flipped byte in the tokenizer": (8, flip("tokenizer.json"), "has sha256"),
    "truncated weights": (8, lambda d: truncate(d / WEIGHTS), "the manifest says"),
    "missing weights": (8, remove(WEIGHTS), "is missing"),
    "missing graph": (8, remove("model.onnx"), "is missing"),
    "link to weights": (8, linked(WEIGHTS), "is a symbolic link"),
    "link to the manifest": (8, linked("manifest.json"), "is a symbolic link"),
    "weights with a second name": (8, hard_linked, "hard links"),
    "manifest that is no JSON": (8, write("manifest.json", b"{"), "is damaged"),
    "manifest without files": (8, manifest(lambda t: t["files"].clear()), "lists no model.onnx"),
    "manifest without a contract": (8, manifest(lambda t: t.pop("contract")), "lacks contract"),
    "manifest with another contract": (8, manifest(lambda t: t["contract"].update(head_dim=8)), "bindings are not"),
    "manifest that leaves the folder": (
        8,
        manifest(lambda t: t["files"].update({"../x": t["files"]["model.onnx"]})),
        "is not a plain path",
    ),
    "newer schema": (3, manifest(lambda t: t.update(schema_version=3)), "install a newer one"),
    "build that did not finish": (3, unfinished, "did not finish"),
    "no manifest": (3, remove("manifest.json"), "has no manifest.json"),
    "no weights": (3, manifest(lambda t: t.update(weights=False)), "was built without weights"),
    "graph that is no graph": (8, both(write("model.onnx", b"junk"), record("model.onnx")), "can not load"),
    "tokenizer that is none": (3, both(write("tokenizer.json", b"{}"), record("tokenizer.json")), "is not a tokenizer"),
    "no tokenizer for a text": (
        3,
        both(remove("tokenizer.json"), manifest(lambda t: t["files"].pop("tokenizer.json"))),
        "has no tokenizer.json",
    ),
}


@pytest.mark.parametrize("name", BUNDLES)
def test_bundle(name: str, tmp_path: Path) -> None:
    code, damage, sentence = BUNDLES[name]
    damage(copied(bundle("fp32"), tmp_path / "bundle"))
    assert sentence in refused(code, "run", tmp_path / "bundle", "--prompt", "the", "--max-new-tokens", 1)


@pytest.mark.parametrize("command", ["run", "bench", "validate", "inspect", "verify"])
@pytest.mark.parametrize("kind", ["missing", "file", "checkpoint"])
def test_what_is_no_bundle(command: str, kind: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    place = checkpoint() if kind == "checkpoint" else tmp_path / kind
    more = ["--ids", "1"] if command == "run" else []
    assert "expected a bundle" in refused(3, command, place, *more)


VERIFIED: Mapping[str, tuple[Break, str, str]] = {
    "flipped byte in weights": (flip(WEIGHTS), WEIGHTS, "changed"),
    "flipped byte in the graph": (flip("model.onnx"), "model.onnx", "changed"),
    "truncated weights": (lambda d: truncate(d / WEIGHTS), WEIGHTS, "changed"),
    "missing weights": (remove(WEIGHTS), WEIGHTS, "missing"),
    "link to weights": (linked(WEIGHTS), WEIGHTS, "not plain"),
    "file that nobody listed": (write("weights/more.safetensors", b""), "weights/more.safetensors", "unexpected"),
}


@pytest.mark.parametrize("name", VERIFIED)
def test_verify_finds(name: str, tmp_path: Path) -> None:
    damage, path, kind = VERIFIED[name]
    damage(copied(bundle("fp32"), tmp_path / "bundle"))
    called = call("verify", tmp_path / "bundle", "--json")
    assert called.code == 8
    assert "1 file " in called.error
    (problem,) = json.loads(called.out)["problems"]
    assert (problem["path"], problem["kind"]) == (path, kind)


def test_validate_with_another_checkpoint(tmp_path: Path) -> None:
    config(num_experts_per_tok=2)(copied(checkpoint(), tmp_path / "checkpoint"))
    assert refused(3, "validate", bundle("fp32"), "--checkpoint", tmp_path / "checkpoint")
    assert "no longer at" in refused(3, "validate", bundle("fp32"), "--checkpoint", tmp_path / "nowhere")
    assert "has no engine for tensorrt" in refused(3, "validate", bundle("fp32"), "--target", "tensorrt")
