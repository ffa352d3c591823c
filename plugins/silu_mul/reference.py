from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, both [..., F], rounded once."""
    return (F.silu(gate.float()) * up.float()).to(gate.dtype)
