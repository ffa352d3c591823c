from __future__ import annotations

import torch
from torch import Tensor

from glm_export.plugins.residual_add.reference import residual_add


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Returns x [..., D] normalized over D; weight [D] float32.

    transformers rounds once more, between normalizing and multiplying by the weight; like every engine we do not.
    """
    x_f32 = x.float()
    y = x_f32 * torch.rsqrt(x_f32.square().mean(dim=-1, keepdim=True) + epsilon) * weight
    return y.to(x.dtype, copy=True)


def add_rms_norm(residual: Tensor, update: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """How every block ends: the sum with the residual stream, and its norm; all [..., D] but the weight [D]."""
    total = residual_add(residual, update)
    return total, rms_norm(total, weight, epsilon)
