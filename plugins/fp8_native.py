"""Quantization of many rows on a CPU: what plugins/fp8.py defines, bit for bit, in one native pass over the weights.

The call releases the interpreter, so several threads quantize at once. Where the library was not built, or
GLM_EXPORT_CPU=portable leaves it out, the definition itself is what runs.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from glm_export.plugins import fp8
from glm_export.plugins.library import cpu_kernels, cpu_library, wants_kernels

_ONNX_TYPES = {torch.float32: 1, torch.float16: 10, torch.bfloat16: 16}


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor] | None:
    """Quantizes every row of `x`, as fp8.quantize_rows does.

    Args:
        x: [..., I], contiguous, on the CPU; float32, float16 or bfloat16.

    Returns:
        values [..., I] float8_e4m3fn and scales [...] float32; None if an element of `x` is not finite.

    Raises:
        ValueError: GLM_EXPORT_CPU asks for what this machine can not run.
    """
    function = _function() if wants_kernels() else None
    if function is None:
        return fp8.quantize_rows(x) if x.isfinite().all() else None
    values = torch.empty(x.shape, dtype=torch.float8_e4m3fn)
    scale = torch.empty(x.shape[:-1], dtype=torch.float32)
    rows = scale.numel()
    assert x.is_contiguous()
    done = function(_ONNX_TYPES[x.dtype], x.data_ptr(), rows, x.shape[-1], values.data_ptr(), scale.data_ptr())
    if done < 0:
        library = cpu_library()
        assert library is not None
        cpu_kernels(library)  # raises with the reason
    return (values, scale) if done == rows else None


@functools.cache
def _function() -> Callable[[int, int, int, int, int, int], int] | None:
    library = cpu_library()
    if library is None:
        return None
    function = ctypes.CDLL(str(library)).glm_quantize_rows
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    function.argtypes = [ctypes.c_int32, pointer, size, size, pointer, pointer]
    function.restype = ctypes.c_int64
    return function
