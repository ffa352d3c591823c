"""Where the compiled kernels are, and what they offer. Importing it imports nothing heavy."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

CPU_VARIABLE = "GLM_EXPORT_CPU"
"""Forces an instruction set (scalar, avx2, avx512); `portable` leaves the kernels out, so that function bodies run."""

PORTABLE = "portable"


@dataclass(frozen=True, kw_only=True, slots=True)
class Kernels:
    """What runs as a kernel of ours."""

    isa: str
    ops: tuple[str, ...]


def cpu_library() -> Path | None:
    """The custom-op library for ONNX Runtime on a CPU; None where it was not built."""
    return _beside("libglm_ops.so")


def cuda_library() -> Path | None:
    """The CUDA kernels behind cuda/launch.h; None where they were not built, for want of an nvcc."""
    return _beside("libglm_cuda.so")


def tensorrt_plugin_library() -> Path | None:
    """The TensorRT plugins in C++; None where they were not built, for want of TensorRT's headers."""
    return _beside("libglm_trt_plugins.so")


def rtx_name_library() -> Path | None:
    """The empty library called libtensorrt_rtx.so, for TensorRT-RTX's parser; None where it was not built."""
    return _beside("libglm_rtx_name.so")


def cpu_kernels(library: Path) -> Kernels:
    """What a library offers under the present GLM_EXPORT_CPU.

    Raises:
        ValueError: there is no such instruction set, or the machine lacks it.
    """
    describe = ctypes.CDLL(str(library)).glm_kernels
    describe.restype = ctypes.c_char_p
    isa, *ops = describe().decode().split() or [""]
    if not isa:
        raise ValueError(f"{CPU_VARIABLE} is {os.environ.get(CPU_VARIABLE)!r}: this machine can not run that.")
    return Kernels(isa=isa, ops=tuple(sorted(ops)))


@contextlib.contextmanager
def forced_cpu(isa: str) -> Iterator[None]:
    """Sets GLM_EXPORT_CPU for the sessions that are opened meanwhile; each keeps what it said then."""
    before = os.environ.get(CPU_VARIABLE)
    os.environ[CPU_VARIABLE] = isa
    try:
        yield
    finally:
        if before is None:
            del os.environ[CPU_VARIABLE]
        else:
            os.environ[CPU_VARIABLE] = before


def wants_kernels() -> bool:
    """Whether GLM_EXPORT_CPU leaves the kernels in."""
    return os.environ.get(CPU_VARIABLE) != PORTABLE


def _beside(name: str) -> Path | None:
    path = Path(__file__).with_name(name)
    return path if path.is_file() else None
