from __future__ import annotations

from torch import Tensor

from glm_export.plugins.residual_add.reference import residual_add
from glm_export.plugins.rms_norm.reference import rms_norm


def add_rms_norm(x: Tensor, update: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Returns sum and y, both [..., D] in the dtype of x; update [..., D], weight [D] float32."""
    total = residual_add(x, update)
    return total, rms_norm(total, weight, epsilon)
