from __future__ import annotations

import torch
from torch import Tensor

from glm_export.plugins.silu_mul import reference
from glm_export.plugins.silu_mul.schema import SILU_MUL
from glm_export.plugins.torch_library import define


def _fake(gate: Tensor, up: Tensor) -> Tensor:
    return torch.empty_like(gate)


silu_mul = define(SILU_MUL, reference.silu_mul, _fake)
