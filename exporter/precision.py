"""What `--precision` means: in which dtype every kind of parameter is stored and activations are kept."""

from __future__ import annotations

from typing import Literal

import torch

from glm_export.runtime.contract import COMPUTE_DTYPES

PrecisionName = Literal["fp32", "bf16", "fp16", "fp8"]

HIGH_PRECISION = ("norm", "bias", "router", "router_bias")
"""Kinds of parameters that are float32 in every precision: one-dimensional ones and everything in the router."""

QUANTIZED = ("linear", "experts")
"""Kinds of parameters that fp8 stores as E4M3 with one float32 scale per output channel."""


def compute_dtype(precision: str) -> torch.dtype:
    """Dtype of activations and KV cache."""
    dtype = getattr(torch, COMPUTE_DTYPES[precision])
    assert isinstance(dtype, torch.dtype)
    return dtype


def storage_dtype(precision: str, kind: str) -> torch.dtype:
    """Dtype in which a parameter of this kind (layout.Parameter.kind) is stored."""
    if kind in HIGH_PRECISION:
        return torch.float32
    if precision == "fp8" and kind in QUANTIZED:
        return torch.float8_e4m3fn
    return compute_dtype(precision)
