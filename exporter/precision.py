"""What `--precision` means: in which dtype every kind of parameter is stored and activations are kept."""

from __future__ import annotations

import torch

from glm_export.exporter.layout import QUANTIZED
from glm_export.runtime.contract import COMPUTE_DTYPES

HIGH_PRECISION = ("norm", "bias", "router", "router_bias")
"""Kinds of parameters that are float32 in every precision: one-dimensional ones and everything in the router."""


def compute_dtype(precision: str) -> torch.dtype:
    """Dtype of activations and KV cache."""
    dtype = getattr(torch, COMPUTE_DTYPES[precision])
    assert isinstance(dtype, torch.dtype)
    return dtype


def storage_dtype(precision: str, kind: str) -> torch.dtype:
    """Dtype in which a parameter of this kind (layout.Parameter.kind) is stored."""
    if kind in HIGH_PRECISION:
        return torch.float32
    if kind in QUANTIZED.get(precision, ()):
        return torch.float8_e4m3fn
    return compute_dtype(precision)
