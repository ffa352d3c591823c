from __future__ import annotations

import torch
from torch import Tensor

from glm_export.plugins.moe_experts import reference
from glm_export.plugins.moe_experts.schema import FP8_MOE_EXPERTS, MOE_EXPERTS
from glm_export.plugins.torch_library import define


def _fake(hidden: Tensor, expert_ids: Tensor, expert_weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    return torch.empty_like(hidden)


def _fake_fp8(
    hidden: Tensor,
    expert_ids: Tensor,
    expert_weights: Tensor,
    gate_up: Tensor,
    gate_up_scale: Tensor,
    down: Tensor,
    down_scale: Tensor,
) -> Tensor:
    return torch.empty_like(hidden)


moe_experts = define(MOE_EXPERTS, reference.moe_experts, _fake)
fp8_moe_experts = define(FP8_MOE_EXPERTS, reference.fp8_moe_experts, _fake_fp8)
