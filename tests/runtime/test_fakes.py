"""The fakes against the real modules, where these are installed: same names, same parameters, same numbers."""

from __future__ import annotations

import inspect
import re
from enum import IntEnum
from typing import Any

import fake_cuda
import fake_tensorrt
import pytest


def public(kind: type) -> list[str]:
    return [name for name in vars(kind) if not name.startswith("_")]


def test_fake_cuda() -> None:
    real = pytest.importorskip("cuda.bindings.runtime", reason="cuda-python is not installed")
    functions = [name for name in public(fake_cuda.FakeCuda) if name.startswith("cuda")]
    functions = [name for name in functions if inspect.isfunction(getattr(fake_cuda.FakeCuda, name))]
    assert len(functions) > 20
    for name in functions:
        # Its first line is the signature: cudaMemcpyAsync(dst, src, size_t count, kind: cudaMemcpyKind, stream)
        arguments = re.match(rf"{name}\((.*)\)", getattr(real, name).__doc__).group(1)
        fake = inspect.signature(getattr(fake_cuda.FakeCuda, name)).parameters
        assert len(fake) - 1 == len([text for text in arguments.split(",") if text.strip()]), name
    for fake_enum, real_enum in (
        (fake_cuda.CudaErrorCode, real.cudaError_t),
        (fake_cuda.Kind, real.cudaMemcpyKind),
    ):
        for member in fake_enum:
            assert int(getattr(real_enum, member.name)) == member
    attributes = vars(fake_cuda.FakeCuda.cudaDeviceAttr)
    assert {name: int(getattr(real.cudaDeviceAttr, name)) for name in attributes} == attributes
    assert real.cudaStreamNonBlocking == fake_cuda.FakeCuda.cudaStreamNonBlocking
    assert int(real.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal) == 1


@pytest.mark.parametrize("module", ["tensorrt", "tensorrt_rtx"])
def test_fake_tensorrt(module: str) -> None:
    real: Any = pytest.importorskip(module, reason=f"{module} is not installed")
    rtx = module == "tensorrt_rtx"
    for fake, name in (
        (fake_tensorrt.FakeRuntime, "Runtime"),
        (fake_tensorrt.FakeEngine, "ICudaEngine"),
        (fake_tensorrt.FakeContext, "IExecutionContext"),
    ):
        for method in public(fake):
            if rtx or method != "create_runtime_config":
                assert hasattr(getattr(real, name), method), f"{name}.{method}"
    enums: list[tuple[type[IntEnum] | type[fake_tensorrt.DataType], str]] = [
        (fake_tensorrt.DataType, "DataType"),
        (fake_tensorrt.TensorIOMode, "TensorIOMode"),
        (fake_tensorrt.TensorLocation, "TensorLocation"),
        (fake_tensorrt.Strategy, "ExecutionContextAllocationStrategy"),
    ]
    if rtx:
        enums.append((fake_tensorrt.GraphStrategy, "CudaGraphStrategy"))
        for method in ("set_execution_context_allocation_strategy", "cuda_graph_strategy"):
            assert hasattr(real.IRuntimeConfig, method)
    for fake_enum, name in enums:
        for member in fake_enum:
            assert hasattr(getattr(real, name), member.name), f"{name}.{member.name}"
