"""What is known before an engine is built: machines that can not, and what it takes on those that can."""

import re
from types import SimpleNamespace

import onnx
import pytest
from engine_tools import EngineOf

from glm_export.exporter.recipe import Engine
from glm_export.exporter.tensorrt import estimate as estimate_module
from glm_export.exporter.tensorrt.estimate import Estimate, PeakMemory, check_machine, check_resources, estimate
from glm_export.runtime import cuda
from glm_export.runtime.engine_info import EngineInfo
from glm_export.runtime.errors import BackendError, GlmExportError, ResourceError, UsageError

GPUS = {"8.0": "NVIDIA A100", "9.0": "NVIDIA H200", "10.0": "NVIDIA B200", "7.5": "Tesla T4"}


@pytest.fixture
def machine_with(monkeypatch: pytest.MonkeyPatch) -> object:
    """A machine with full TensorRT and a GPU of some compute capability."""

    def put(capability: str) -> None:
        gpu = cuda.Gpu(name=GPUS[capability], compute_capability=capability)
        monkeypatch.setattr(cuda, "gpu", lambda: gpu)
        monkeypatch.setattr(
            estimate_module, "load_library", lambda target: SimpleNamespace(target=target, is_rtx=False)
        )

    return put


def test_tensorrt_builds_for_the_gpu_it_finds(machine_with) -> None:
    machine_with("9.0")
    found = check_machine("tensorrt", "fp8", Engine(cache_dtype="fp8"))
    assert (found.compute_capabilities, found.gpu) == (("9.0",), "NVIDIA H200")


def test_tensorrt_rtx_builds_for_those_it_is_told() -> None:
    found = check_machine("tensorrt-rtx", "bf16", Engine(compute_capabilities=("8.0", "12.1")))
    assert (found.compute_capabilities, found.gpu) == (("8.0", "12.1"), None)


@pytest.mark.parametrize(
    ("capability", "precision", "engine", "error", "sentence"),
    [
        ("8.0", "fp8", Engine(), BackendError, "NVIDIA A100 has compute capability 8.0, FP8 needs 8.9"),
        ("8.0", "bf16", Engine(cache_dtype="fp8"), BackendError, "FP8 needs 8.9 or more: use cache_dtype compute"),
        ("7.5", "fp16", Engine(), BackendError, "Tesla T4 has compute capability 7.5, the kernels"),
        ("9.0", "fp32", Engine(), BackendError, "The target tensorrt has no float32 experts"),
        (
            "9.0",
            "bf16",
            Engine(experts="trt_moe"),
            BackendError,
            "needs the target tensorrt and compute capability 10.0",
        ),
        ("10.0", "fp8", Engine(experts="trt_moe"), UsageError, "computes in bf16 and fp16, not in fp8"),
    ],
)
def test_a_gpu_that_can_not(
    machine_with, capability: str, precision: str, engine: Engine, error: type[GlmExportError], sentence: str
) -> None:
    machine_with(capability)
    with pytest.raises(error, match=re.escape(sentence)):
        check_machine("tensorrt", precision, engine)


def test_what_it_can(machine_with) -> None:
    machine_with("8.0")
    check_machine("tensorrt", "bf16", Engine())
    machine_with("10.0")
    check_machine("tensorrt", "bf16", Engine(experts="trt_moe"))


def test_an_estimate_counts_weights_and_caches(engine_of: EngineOf) -> None:
    opened = engine_of("fp8")
    model = onnx.load(opened.model_path, load_external_data=False)
    weights = sum(
        int(entry.value)
        for tensor in model.graph.initializer
        for entry in tensor.external_data
        if entry.key == "length"
    )
    found = {
        dtype: estimate(opened, model, batch=2, capacity=64, cache_dtype=dtype)
        for dtype in ("bfloat16", "float8_e4m3fn")
    }
    assert found["bfloat16"].weight_bytes == weights
    assert found["bfloat16"].gpu_bytes == weights + 2 * 4 * 2 * 2 * 64 * 16 * 2
    assert found["float8_e4m3fn"].gpu_bytes == weights + 2 * 4 * 2 * 2 * 64 * 16
    info = EngineInfo.read(opened, "tensorrt-rtx")
    assert info.plan_bytes < found["bfloat16"].plan_bytes


def test_resources_that_are_too_small(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = Estimate(weight_bytes=9, plan_bytes=9, peak_bytes=20, held_bytes=10, gpu_bytes=9, seconds=1.0)
    check_resources(needed, tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(estimate_module, "available_bytes", lambda: 9)
        with pytest.raises(ResourceError, match="GB of memory and 0"):
            check_resources(needed, tmp_path)
        patched.setattr(estimate_module, "available_bytes", lambda: 10)
        check_resources(needed, tmp_path)
        patched.setattr(estimate_module, "available_bytes", lambda: None)
        check_resources(needed, tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=8))
    with pytest.raises(ResourceError, match="GB free; free some space"):
        check_resources(needed, tmp_path)


def test_memory_that_is_available() -> None:
    assert 1 << 20 < (estimate_module.available_bytes() or 0) < 1 << 50


def test_peak_memory_counts_from_now() -> None:
    def peak_of(megabytes: int) -> int:
        peak = PeakMemory()
        held = b"x" * (megabytes << 20)
        assert len(held)
        return peak.bytes

    large, small = peak_of(200), peak_of(1)
    assert large - small > 150 << 20
