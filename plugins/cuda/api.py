"""The functions of launch.h for Python: argument types declared once, error codes as exceptions. No torch, no numpy."""

from __future__ import annotations

import ctypes
from ctypes import c_char_p, c_float, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import Any

from glm_export.plugins.library import cuda_library

ABI = 1

TYPES = {"float32": 1, "float16": 10, "bfloat16": 16, "float8_e4m3fn": 17}
"""Element types as launch.h numbers them, which is as ONNX does."""

EXPERT_PATHS = {"auto": 0, "decode": 1, "mma": 2, "wgmma": 3}
"""How the experts' products are computed; all but "auto" are for tests and measurements."""

_SIZES = (c_int32,) * 5
SIGNATURES: dict[str, tuple[Any, ...]] = {
    "glm_cuda_abi": (c_int32,),
    "glm_cuda_error": (c_char_p, c_int32),
    "glm_cuda_moe_router": (c_int32, *(c_void_p,) * 4, *(c_int32,) * 6, c_float, c_void_p),
    "glm_cuda_moe_experts": (c_int32, *(c_void_p,) * 9, c_int64, *_SIZES, *(c_int32,) * 3, c_void_p),
    "glm_cuda_moe_experts_workspace": (c_int64, *_SIZES, c_int32, c_int32),
    "glm_cuda_fp8_cache_write": (c_int32, *(c_void_p,) * 3, *_SIZES, c_int32, c_void_p),
}
"""Result, then arguments, in the order of launch.h."""


class CudaError(Exception):
    """A kernel refused its arguments, or could not be started."""

    def __init__(self, function: str, code: int, text: str):
        super().__init__(f"{function}: {text}")
        self.code = code


class CudaKernels:
    """A loaded library of kernels. Pointers are integers: addresses in device memory."""

    def __init__(self, library: Path | None = None):
        """Loads `library`, by default the one that was built with this package.

        Raises:
            FileNotFoundError: there is none.
            OSError: it can not be loaded, or is of another version.
        """
        path = library or cuda_library()
        if path is None:
            raise FileNotFoundError("The CUDA kernels were not built: install glm-export where nvcc is on the path.")
        self._library = ctypes.CDLL(str(path))
        for name, (result, *arguments) in SIGNATURES.items():
            function = getattr(self._library, name, None)
            if function is None:
                raise OSError(f"{path} has no {name}: install glm-export again.")
            function.restype, function.argtypes = result, arguments
        if (found := self._library.glm_cuda_abi()) != ABI:
            raise OSError(f"{path} has interface {found}, expected {ABI}: install glm-export again.")

    def moe_router(
        self,
        *,
        logits: int,
        correction_bias: int,
        expert_ids: int,
        expert_weights: int,
        T: int,
        E: int,
        top_k: int,
        n_group: int,
        topk_group: int,
        norm_topk_prob: int,
        routed_scaling_factor: float,
        stream: int,
    ) -> None:
        """The op MoERouter: logits [T, E] -> expert_ids, expert_weights [T, K]."""
        attributes = (top_k, n_group, topk_group, norm_topk_prob, routed_scaling_factor)
        self._call(
            "glm_cuda_moe_router", logits, correction_bias, expert_ids, expert_weights, T, E, *attributes, stream
        )

    def moe_experts_workspace(
        self, *, T: int, D: int, F: int, E: int, K: int, hidden_type: str, weight_type: str
    ) -> int:
        """Bytes of workspace that `moe_experts` needs for these sizes, or fewer tokens; a multiple of 256."""
        name = "glm_cuda_moe_experts_workspace"
        size: int = getattr(self._library, name)(T, D, F, E, K, TYPES[hidden_type], TYPES[weight_type])
        if size < 0:
            self._raise(name, -size)
        return size

    def moe_experts(
        self,
        *,
        hidden: int,
        expert_ids: int,
        expert_weights: int,
        gate_up: int,
        gate_up_scale: int | None,
        down: int,
        down_scale: int | None,
        out: int,
        workspace: int,
        workspace_bytes: int,
        T: int,
        D: int,
        F: int,
        E: int,
        K: int,
        hidden_type: str,
        weight_type: str,
        stream: int,
        path: str = "auto",
    ) -> None:
        """The ops MoEExperts and FP8MoEExperts (weight_type float8_e4m3fn, with scales): hidden -> out [T, D]."""
        weights = (gate_up, gate_up_scale, down, down_scale)
        self._call(
            "glm_cuda_moe_experts",
            *(hidden, expert_ids, expert_weights, *weights, out, workspace, workspace_bytes),
            *(T, D, F, E, K, TYPES[hidden_type], TYPES[weight_type], EXPERT_PATHS[path], stream),
        )

    def fp8_cache_write(
        self,
        *,
        cache: int,
        update: int,
        write_index: int,
        B: int,
        J: int,
        C: int,
        S: int,
        A: int,
        update_type: str,
        stream: int,
    ) -> None:
        """The op FP8CacheWrite: update [B, J, S, A] into cache [B, J, C, A], in place."""
        sizes = (B, J, C, S, A, TYPES[update_type])
        self._call("glm_cuda_fp8_cache_write", cache, update, write_index, *sizes, stream)

    def _call(self, name: str, *arguments: float | None) -> None:
        code: int = getattr(self._library, name)(*arguments)
        if code:
            self._raise(name, code)

    def _raise(self, name: str, code: int) -> None:
        raise CudaError(name, code, self._library.glm_cuda_error(code).decode())
