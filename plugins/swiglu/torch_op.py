from __future__ import annotations

import torch
from torch import Tensor

from glm_export.plugins.swiglu import reference
from glm_export.plugins.swiglu.schema import SWIGLU
from glm_export.plugins.torch_library import define


def _fake(gate: Tensor, up: Tensor) -> Tensor:
    return torch.empty_like(gate)


swiglu = define(SWIGLU, reference.swiglu, _fake)
