from __future__ import annotations

import torch
from torch import Tensor

from glm_export.plugins.cached_attention import reference
from glm_export.plugins.cached_attention.schema import CACHED_ATTENTION
from glm_export.plugins.torch_library import define


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    write_index: Tensor,
    length: Tensor,
    rotary_dim: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    attentions = q.new_empty((q.shape[0], q.shape[2], q.shape[1], k_cache.shape[2]), dtype=torch.float32)
    return torch.empty_like(q), torch.empty_like(k_cache), torch.empty_like(v_cache), attentions


cached_attention = define(CACHED_ATTENTION, reference.cached_attention, _fake)
