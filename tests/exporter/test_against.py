"""Engines of the tiny bundles on the fake GPU: validated, run, and compared with ONNX Runtime through Polygraphy."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import real_engine
from cli_tools import bundle, call, copied, refused
from fake_tensorrt import FakeGpu
from onnx.external_data_helper import load_external_data_for_model
from polygraphy.comparator import RunResults
from toy import write_engine

from glm_export.exporter.against import validate_against
from glm_export.exporter.progress import Reporter
from glm_export.exporter.validate import validate
from glm_export.runtime.bundle import Bundle
from glm_export.runtime.engine_info import ENGINE_TARGETS

QUIET = Reporter(quiet=True)
TARGET = "tensorrt-rtx"
Change = Callable[[onnx.ModelProto], None]


def with_engine(directory: Path, change: Change | None = None, *, batch: int = 2, capacity: int = 48) -> Path:
    """Adds a fake engine, made of the bundle's own graph with function bodies; `change` makes it a wrong one."""
    model = onnx.load(directory / "model.onnx", load_external_data=False)
    load_external_data_for_model(model, str(directory))
    for value in (*model.graph.input, *model.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param == "C":
                dim.dim_value = capacity
    if change:
        change(model)
    write_engine(directory, TARGET, model=model, batch=batch, capacity=capacity, prefill=5)
    return directory


def forget_routed_scaling(model: onnx.ModelProto) -> None:
    for node in model.graph.node:
        if node.op_type == "MoERouter":
            next(a for a in node.attribute if a.name == "routed_scaling_factor").f = 1.0


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    return FakeGpu.install(monkeypatch)


@pytest.fixture(params=["bf16", "fp8"])
def precision(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def directory(tmp_path: Path, precision: str) -> Path:
    return copied(bundle(precision), tmp_path / "bundle")


def test_an_engine_with_few_rows_and_short_steps_validates(directory: Path, gpu: FakeGpu) -> None:
    opened = Bundle.open(with_engine(directory))
    report = validate(opened, target=TARGET, drift=False, reporter=QUIET)
    assert report, "\n".join(report.lines())
    assert report.engine.max_abs.shape == (17, 4)  # two waves of two rows
    assert gpu.cuda.leftovers() == {}


def test_an_engine_that_is_wrong_does_not(directory: Path, gpu: FakeGpu) -> None:
    opened = Bundle.open(with_engine(directory, forget_routed_scaling))
    assert not validate(opened, target=TARGET, drift=False, reporter=QUIET)


def test_run_decodes_with_the_engine(directory: Path, gpu: FakeGpu) -> None:
    with_engine(directory)
    prompts = ("--ids", "5,6,7,8,9,10,11", "--ids", "3", "--ids", "1,2", "--max-new-tokens", "6", "--json")
    engine = call("run", directory, "--target", TARGET, *prompts)
    assert engine.code == 0, engine
    assert engine.out == call("run", directory, *prompts).out
    assert gpu.library(TARGET).deserialized == 1


def test_engines_agree(directory: Path, precision: str, gpu: FakeGpu, tmp_path: Path) -> None:
    with_engine(directory)
    saved = tmp_path / "outputs.json"
    command = ("validate", directory, "--target", TARGET, "--against", "onnxruntime", "--save-outputs", saved, "-q")
    called = call(*command, "--json")
    assert called.code == 0, called
    report = json.loads(called.out)
    assert report == json.loads((directory / f"reports/{TARGET}-against-onnxruntime.json").read_text())
    assert (report["passed"], report["precision"]) == (True, precision)
    results = RunResults.load(saved)
    assert [name for name, _ in results.items()] == [TARGET, "onnxruntime"]
    engine, kernels = (np.asarray(results[name][0]["logits"]) for name in (TARGET, "onnxruntime"))
    assert engine.shape == (17, 4, 512)
    # The engine is made of function bodies, and they compute what the kernels compute up to the order of float32 sums
    # of some hundred terms. That turns a rounding to bfloat16 or E4M3 now and then, and all tokens after it are further
    # apart; the others are not.
    relative = np.linalg.norm(engine - kernels, axis=-1) / np.linalg.norm(kernels, axis=-1)
    assert np.quantile(relative, 0.1) < 2**-20
    assert Bundle.open(directory).verify()


def test_kernels_against_bodies_without_a_gpu(directory: Path) -> None:
    report = validate_against(Bundle.open(directory), target="onnxruntime", against="portable", steps=4, reporter=QUIET)
    assert report, "\n".join(report.lines())
    assert report.engines.relative_l2.max() > 0, "both ran the same"
    titles = [line.split("  ")[0] for line in report.lines()[2:6]]
    assert titles == [
        "onnxruntime - portable",
        f"onnxruntime - {report.precision} reference",
        f"portable - {report.precision} reference",
        f"{report.precision} reference - its twin",
    ]


def test_engines_that_disagree_exit_with_4_and_the_report_says_which(directory: Path, gpu: FakeGpu) -> None:
    with_engine(directory, forget_routed_scaling)
    called = call("validate", directory, "--target", "onnxruntime", "--against", TARGET, "-q")
    assert called.code == 4, called
    assert called.error.startswith(f"The engines onnxruntime and {TARGET} of ")
    assert "FAILED" in called.out
    report = json.loads((directory / f"reports/onnxruntime-against-{TARGET}.json").read_text())
    assert not report["passed"]
    allowed = report["verdict"]["tolerance"]["bound"]
    assert report["first"]["relative_l2_median"] < allowed < report["second"]["relative_l2_median"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--against", "onnxruntime"), "--against onnxruntime is the engine itself"),
        (("--against", "portable", "--steps", "2", "--checkpoint", "x"), "--checkpoint is for the drift"),
        (("--against", "portable", "--cache-dtype", "float32"), "--cache-dtype is not for --against"),
        (("--save-outputs", "x.json"), "--save-outputs is for --against"),
        (("--against", "tensor"), "'tensor' is not one of"),
    ],
)
def test_wrong_options(options: tuple[str, ...], message: str) -> None:
    assert message in refused(2, "validate", bundle("fp8"), *options)


def test_an_engine_that_is_not_there(gpu: FakeGpu) -> None:
    message = f"has no engine for {TARGET}: add one with `glm-export engine"
    assert message in refused(3, "validate", bundle("fp8"), "--against", TARGET, "-q")
    assert message in refused(3, "run", bundle("fp8"), "--target", TARGET, "--ids", "1")


def test_without_polygraphy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    message = refused(6, "validate", bundle("fp8"), "--against", "portable")
    assert message == '--against needs the library polygraphy: pip install "glm-export[polygraphy]".'


def test_a_changed_plan_byte_is_refused_without_a_gpu_too(tmp_path: Path, gpu: FakeGpu) -> None:
    directory = with_engine(copied(bundle("fp8"), tmp_path / "bundle"))
    plan = directory / f"engines/{TARGET}/model.plan"
    data = bytearray(plan.read_bytes())
    data[len(data) // 2] ^= 0x10
    plan.write_bytes(data)
    for gpu.cuda.gpus in (0, 1):
        for command in (("run", directory, "--ids", "1"), ("validate", directory, "-q", "--no-drift")):
            assert "model.plan has sha256" in refused(8, *command, "--target", TARGET)
    assert gpu.library(TARGET).deserialized == 0


@pytest.mark.parametrize("target", ENGINE_TARGETS)
def test_real_engines_of_the_tiny_model(directory: Path, target: str) -> None:
    if reason := real_engine.missing(target):
        pytest.skip(reason)
    built = call("engine", directory, "--target", target, "-q")
    assert built.code == 0, built
    for more in (("--no-drift",), ("--against", "onnxruntime")):
        called = call("validate", directory, "--target", target, "-q", *more)
        assert called.code == 0, called
