"""Engines on the command line: build, engine, inspect, and what is said where one can not be built or run."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import filelock
import onnx
import pytest
from cli_tools import bundle, call, checkpoint, copied, refused
from engine_tools import EngineOf

from glm_export.exporter.tensorrt import estimate as estimate_module
from glm_export.plugins.library import cuda_library
from glm_export.runtime.bundle import Bundle
from glm_export.runtime.files import sha256_of

PROGRAM = (sys.executable, "-m", "glm_export.exporter.cli")
RTX = ("--target", "tensorrt-rtx")
SMALL = ("--sm", "89", "--max-batch", 2, "--capacity", 64, "--prefill", 16)


@pytest.fixture(scope="module")
def with_engine(engine_of: EngineOf) -> Path:
    return engine_of("fp8").directory


def test_build_adds_the_engine(tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    command = ("build", checkpoint(), "-o", out, "--recipe", "tiny", "-p", "bf16", "--layers", 2, *RTX, "--sm", "120")
    called = call(
        *command, "--capacity", 32, "--set", "engine.prefill=8", "--set", "validate.prompt_tokens=8", "--json"
    )
    assert called.code == 0, called
    assert json.loads(called.out)["engines"] == ["tensorrt-rtx"]
    assert "building for tensorrt-rtx, compute capability 12.0: about 0.0" in called.err
    assert f"glm-export engine {out} --target tensorrt-rtx" in called.err
    assert "engine: 0.0" in called.err
    assert ("this engine can not run" in called.err) == (cuda_library() is None)
    opened = Bundle.open(out, check="full")
    info = json.loads((out / "engines/tensorrt-rtx/engine.json").read_text())
    assert (info["capacity"], info["batch"], info["prefill"]) == (32, 4, 8)
    assert info["compute_capabilities"] == ["12.0"]
    assert opened.manifest.recipe["engine"]["compute_capabilities"] == ["12.0"]
    assert call("verify", out, "--quiet").code == 0


def test_engine_adds_and_replaces(tmp_path: Path) -> None:
    path = copied(bundle("fp8"), tmp_path / "bundle")
    first = call("engine", path, *RTX, *SMALL, "--json", "--quiet")
    assert (first.code, first.err) == (0, "")
    found = json.loads(first.out)
    assert found == {"path": str(path)} | json.loads((path / "engines/tensorrt-rtx/engine.json").read_text())
    assert (found["cache_dtype"], found["layers"]["kv_cache_update"]) == ("bfloat16", 8)

    manifest = (path / "manifest.json").read_bytes()
    assert "has an engine for tensorrt-rtx: --replace" in refused(2, "engine", path, *RTX, *SMALL)
    assert (path / "manifest.json").read_bytes() == manifest

    second = call("engine", path, *RTX, *SMALL, "--cache-dtype", "fp8", "--replace", "--quiet")
    assert second.out.startswith(f"{path}: tensorrt-rtx, ")
    info = json.loads((path / "engines/tensorrt-rtx/engine.json").read_text())
    assert (info["cache_dtype"], info["layers"]["FP8CacheWrite"]) == ("float8_e4m3fn", 8)
    assert call("verify", path, "--quiet").code == 0
    assert sorted(file.name for file in (path / "engines").rglob("*")) == ["engine.json", "model.plan", "tensorrt-rtx"]


# Refusals


ENGINE_ARGUMENTS: Mapping[str, tuple[int, tuple[object, ...], str]] = {
    "no target": (2, (), "Missing option '--target'"),
    "target without engines": (2, ("--target", "onnxruntime"), "'onnxruntime' is not one of"),
    "target that does not exist": (2, ("--target", "tensorrt_rtx"), "'tensorrt_rtx' is not one of"),
    "FP8 on a GPU without it": (6, (*RTX, "--sm", "86"), "8.6 is asked, FP8 needs 8.9 or more: use a bf16 bundle"),
    "data-centre GPU": (2, (*RTX, "--sm", "90"), "has '9.0'"),
    "GPU that does not exist": (2, (*RTX, "--sm", "122"), "has '12.2' (did you mean '12."),
    "prefill 0": (2, (*RTX, "--prefill", 0), "0 is not in the range x>=1"),
    "capacity 0": (2, (*RTX, "--capacity", 0), "0 is not in the range x>=1"),
    "capacity above the positions": (2, (*RTX, "--capacity", 1025), "1025 is more than the model's 1024 positions"),
    "library that is not installed": (
        6,
        ("--target", "tensorrt"),
        'needs the library tensorrt: pip install "glm-export',
    ),
    "GPUs for a target without a choice": (2, ("--target", "tensorrt", "--sm", "90"), "--sm is for the target"),
}


@pytest.mark.parametrize("name", ENGINE_ARGUMENTS)
def test_engine_argument(name: str) -> None:
    code, arguments, sentence = ENGINE_ARGUMENTS[name]
    before = sorted(bundle("fp8").rglob("*"))
    assert sentence in refused(code, "engine", bundle("fp8"), *arguments)
    assert sorted(bundle("fp8").rglob("*")) == before


def test_fp8_cache_on_a_gpu_without_fp8() -> None:
    found = refused(6, "engine", bundle("bf16"), *RTX, "--sm", "86", "--cache-dtype", "fp8")
    assert "FP8 needs 8.9 or more: use cache_dtype compute" in found


def test_bundles_that_can_have_no_engine(tmp_path: Path) -> None:
    graph = tmp_path / "graph"
    assert call("build", "--no-weights", "-o", graph, "--recipe", "tiny", "--layers", 1, "--quiet").code == 0
    assert "built without weights" in refused(3, "engine", graph, *RTX)
    assert "has no float32 experts" in refused(6, "engine", bundle("fp32"), *RTX)
    assert "has no manifest.json" in refused(3, "engine", tmp_path, *RTX)


def test_a_damaged_weight_gets_into_no_engine(tmp_path: Path) -> None:
    path = copied(bundle("fp8"), tmp_path / "bundle")
    weights = path / "weights" / "layer-001.safetensors"
    data = bytearray(weights.read_bytes())
    data[-100] ^= 1
    weights.write_bytes(data)
    called = call("engine", path, *RTX)
    assert called.code == 8
    assert "layer-001.safetensors has sha256" in called.error
    assert not (path / "engines").exists()


def test_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    path = bundle("fp8")
    with monkeypatch.context() as patched:
        patched.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
        assert "has 0.0 GB free; free some space" in refused(5, "engine", path, *RTX)
    monkeypatch.setattr(estimate_module, "available_bytes", lambda: 1000)
    assert "of memory and 0.0 GB are available" in refused(5, "engine", path, *RTX)


def test_a_locked_bundle(tmp_path: Path) -> None:
    path = copied(bundle("fp8"), tmp_path / "bundle")
    with filelock.FileLock(tmp_path / "bundle.lock"):
        called = call("engine", path, *RTX, "--quiet")
    assert called.code == 7
    assert "Another process is building" in called.error
    assert not (path / "engines").exists()


@pytest.mark.parametrize("command", [("run", "--ids", "1,2"), ("validate", "--no-drift", "--quiet")])
def test_an_engine_needs_a_gpu_to_run(command: tuple[str, ...], with_engine: Path) -> None:
    verb, *options = command
    assert "There is no NVIDIA GPU" in refused(6, verb, with_engine, *options, *RTX, *capacity(verb))


def capacity(verb: str) -> tuple[object, ...]:
    return ("--capacity", 64) if verb == "run" else ()


# Interrupted builds


def content(path: Path) -> dict[str, str]:
    return {str(file.relative_to(path)): sha256_of(file) for file in sorted(path.rglob("*")) if file.is_file()}


@pytest.mark.parametrize(
    ("number", "code", "had_one"),
    [(signal.SIGINT, 130, False), (signal.SIGTERM, 143, True), (signal.SIGKILL, -9, True)],
)
def test_a_stopped_build_leaves_the_bundle(
    number: signal.Signals, code: int, had_one: bool, tmp_path: Path, with_engine: Path
) -> None:
    path = copied(with_engine if had_one else bundle("fp8"), tmp_path / "bundle")
    before = content(path)
    command = [*PROGRAM, "engine", str(path), *RTX, *(("--replace",) if had_one else ())]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        until = time.monotonic() + 60
        while not (path / "engines/tensorrt-rtx.building/model.plan.tmp").exists() and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(0.5)  # now it is in the library
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert out == ""
    assert "Traceback" not in err
    after = content(path)
    assert {name: after[name] for name in before} == before
    assert call("verify", path, "--quiet").code == 0
    if number != signal.SIGKILL:
        assert err.endswith(f"glm-export: stopped by {number.name}\n")
        assert "stopping at the library's next step" in err
        assert after == before
        assert (path / "engines").exists() == had_one
    else:  # and the next build clears away what is left
        called = call("engine", path, *RTX, *SMALL, "--replace", "--quiet")
        assert called.code == 0, called
        assert sorted(file.name for file in (path / "engines").iterdir()) == ["tensorrt-rtx"]


# inspect


def test_inspect_shows_engines(with_engine: Path) -> None:
    info = json.loads((with_engine / "engines/tensorrt-rtx/engine.json").read_text())
    assert json.loads(call("inspect", with_engine, "--json").out)["engines"] == {"tensorrt-rtx": info}
    lines = call("inspect", with_engine).out.splitlines()
    assert "engine tensorrt-rtx" in lines
    assert any(line.split() == ["layers.MoERouter", "3"] for line in lines)


def test_inspect_shows_the_network(with_engine: Path) -> None:
    called = call("inspect", with_engine, *RTX)
    assert (called.code, called.err) == (0, "")
    lines = called.out.splitlines()
    assert lines[0].startswith(f"{with_engine}: tensorrt-rtx 1.")
    assert lines[0].endswith("at most 2 x 64 tokens, 16 of them in one step")
    assert "  k_cache.0..3  bfloat16 [?,2,64,16]" in lines
    layers = [line.split() for line in lines]
    router = next(
        line for line in layers if line[:1] == ["MoERouter"] and line[-1] == "model.layers.1.mlp.gate/MoERouter"
    )
    assert router[1:3] == ["float32[?,8],", "float32[8]"]
    assert sum(line[:4] == ["matrix_multiply", "fp8", "x", "fp8"] for line in layers) == 28
    assert sum(line[:4] == ["attention_input", "lower_right", "with", "lengths"] for line in layers) == 4
    assert sum(line[:1] == ["kv_cache_update"] for line in layers) == 1 + 8  # in the table of counts too

    found = json.loads(call("inspect", with_engine, *RTX, "--json").out)
    assert found["engine"] is None  # there is no GPU
    assert found["counts"] == json.loads((with_engine / "engines/tensorrt-rtx/engine.json").read_text())["layers"]
    experts = [layer for layer in found["layers"] if layer["plugin"] == "FP8MoEExperts"]
    assert [len(layer["inputs"]) for layer in experts] == [7] * 3


def test_inspect_saves_the_network(tmp_path: Path) -> None:
    assert "say which with --target" in refused(2, "inspect", bundle("bf16"), "--save-onnx", tmp_path / "n.onnx")
    called = call("inspect", bundle("bf16"), *RTX, "--save-onnx", tmp_path / "network.onnx")
    assert called.code == 0, called
    model = onnx.load(tmp_path / "network.onnx", load_external_data=False)
    ops = [node.op_type for node in model.graph.node]
    assert (ops.count("MoERouter"), ops.count("TRT_Attention"), ops.count("TensorScatter")) == (3, 4, 8)
