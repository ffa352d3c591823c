"""What this machine can do at this moment: bytes read from memory and arithmetic per second, measured natively.

The figures of a shared machine change from minute to minute, so a comparison measures them just before and after what
it compares. GLM_EXPORT_CPU chooses the instruction set as it does for the kernels.
"""

from __future__ import annotations

import ctypes
import functools
import os
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from glm_export.plugins.library import cpu_kernels, cpu_library

BLOCK_BYTES = 3 << 20
"""A typical expert."""

_ONNX_TYPES = {"float32": 1, "bfloat16": 16}
_ROUNDS = 1 << 21  # some ten milliseconds


@dataclass(frozen=True, kw_only=True, slots=True)
class Read:
    """One pass over some memory."""

    seconds: float
    sum: int
    """Of its 64-bit words, modulo 2^64: that of all of them, if each was read once."""


def read(memory: npt.NDArray[np.uint64], *, threads: int, block_bytes: int | None = None) -> Read:
    """Reads memory once, each thread its share.

    Args:
        memory: [N] uint64, contiguous.
        threads: how many read, at the same time.
        block_bytes: read blocks of this size in random order, each by all threads; all in order when None.

    Raises:
        ValueError: GLM_EXPORT_CPU asks for what this machine can not run.
    """
    assert memory.flags.c_contiguous
    assert memory.dtype == np.uint64
    block = memory.size if block_bytes is None else block_bytes // memory.itemsize
    total = ctypes.c_uint64()
    seconds = _library().glm_meter_read(memory.ctypes.data, memory.size, max(1, block), threads, ctypes.byref(total))
    return Read(seconds=_measured(seconds), sum=total.value)


def multiply(dtype: str, *, threads: int) -> float | None:
    """Products and sums per second in registers, of all threads together.

    Args:
        dtype: float32; or bfloat16, for dot products of bfloat16 that are summed in float32.
        threads: how many compute, at the same time.

    Returns:
        Operations per second; None where the machine has no instruction for it.

    Raises:
        ValueError: GLM_EXPORT_CPU asks for what this machine can not run.
    """
    return _measured(_library().glm_meter_multiply(_ONNX_TYPES[dtype], _ROUNDS, threads)) or None


def _measured(value: float) -> float:
    if value < 0:
        library = cpu_library()
        assert library is not None
        cpu_kernels(library)  # raises with the reason
        raise OSError("The machine has no more threads to measure with.")
    return value


@functools.cache
def _library() -> ctypes.CDLL:
    path = cpu_library()
    if path is None:
        raise FileNotFoundError("the CPU kernels are not built")
    library = ctypes.CDLL(os.fspath(path))
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    library.glm_meter_read.argtypes = [pointer, size, size, size, ctypes.POINTER(ctypes.c_uint64)]
    library.glm_meter_read.restype = ctypes.c_double
    library.glm_meter_multiply.argtypes = [ctypes.c_int32, size, size]
    library.glm_meter_multiply.restype = ctypes.c_double
    return library
