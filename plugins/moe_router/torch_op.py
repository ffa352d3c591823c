from __future__ import annotations

import torch
from torch import Tensor

from glm_export.plugins.moe_router import reference
from glm_export.plugins.moe_router.schema import MOE_ROUTER
from glm_export.plugins.torch_library import define


def _fake(
    logits: Tensor,
    correction_bias: Tensor,
    top_k: int,
    n_group: int,
    topk_group: int,
    norm_topk_prob: int,
    routed_scaling_factor: float,
) -> tuple[Tensor, Tensor]:
    shape_TK = (logits.shape[0], top_k)
    return logits.new_empty(shape_TK, dtype=torch.int32), logits.new_empty(shape_TK)


moe_router = define(MOE_ROUTER, reference.moe_router, _fake)
