from __future__ import annotations

from torch import Tensor

from glm_export.plugins.linear.reference import fp8_linear, linear


def logits(x: Tensor, weight: Tensor) -> Tensor:
    """Returns [B, V] float32 from x [B, 1, D] and weight [V, D] of any floating dtype."""
    return linear(x.float(), weight).squeeze(1)


def fp8_logits(x: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    """As `logits` with an E4M3 weight and its row scales [V] float32; x is rounded to FP8 per row."""
    return fp8_linear(x.float(), weight, weight_scale).squeeze(1)
