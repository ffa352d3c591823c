"""A plugin's call as a call of the CUDA kernels: which operand, size and dtype goes where."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from glm_export.plugins.cuda.api import CudaKernels

_EXPERT_WEIGHTS = {"MoEExperts": None, "FP8MoEExperts": "float8_e4m3fn"}
"""The dtype of the experts' weights; None is that of hidden."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """What one call of an op is about."""

    op: str
    sizes: Mapping[str, int]
    """By shape letter."""
    attributes: Mapping[str, int | float]
    dtype: str
    """Of the tensors with a choice of dtypes; empty if there are none."""

    def of(self, letters: str) -> dict[str, Any]:
        """The sizes of these letters."""
        return {letter: self.sizes[letter] for letter in letters}

    def types(self) -> dict[str, Any]:
        """The dtypes of MoEExperts and FP8MoEExperts, as the kernels call them."""
        return {"hidden_type": self.dtype, "weight_type": _EXPERT_WEIGHTS[self.op] or self.dtype}


def workspace_bytes(kernels: CudaKernels, call: Call) -> int:
    """The workspace that an op needs for these sizes, or fewer tokens.

    Raises:
        CudaError: there is no kernel for this.
    """
    if call.op not in _EXPERT_WEIGHTS:
        return 0
    return kernels.moe_experts_workspace(**call.of("TDFEK"), **call.types())


def launch(kernels: CudaKernels, call: Call, addresses: Mapping[str, int], *, workspace: int, stream: int) -> None:
    """Puts an op on the stream.

    Args:
        kernels: the CUDA library.
        call: op, sizes, attributes and dtype.
        addresses: in device memory, by the names of inputs and outputs in the schema.
        workspace: the address of as many bytes as `workspace_bytes` says.
        stream: the cudaStream_t.

    Raises:
        CudaError: an argument is wrong, or CUDA reported an error.
        ValueError: an output is not where its input is.
    """
    if call.op == "MoERouter":
        rest: Mapping[str, Any] = call.attributes
        kernels.moe_router(**addresses, **call.of("TE"), **rest, stream=stream)
    elif call.op == "FP8CacheWrite":
        cache, update, write_index, cache_out = addresses.values()
        if cache_out != cache:
            raise ValueError("FP8CacheWrite: cache_out is not in the memory of cache; bind both to one address.")
        where = {"cache": cache, "update": update, "write_index": write_index}
        kernels.fp8_cache_write(**where, **call.of("BJCSA"), update_type=call.dtype, stream=stream)
    else:
        operands: dict[str, Any] = {"gate_up_scale": None, "down_scale": None, **addresses}
        size = workspace_bytes(kernels, call)
        kernels.moe_experts(
            **operands, **call.of("TDFEK"), **call.types(), workspace=workspace, workspace_bytes=size, stream=stream
        )
