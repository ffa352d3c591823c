"""Routed experts, one expert after the other.

The intermediate activations are rounded to the dtype of `hidden` (and in FP8 then per row to E4M3), because that is
what the second matrix product of every real kernel reads; gate, up and the weighted sum stay float32.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from glm_export.plugins.fp8 import dequantize_rows, fake_quantize_rows


def moe_experts(hidden: Tensor, expert_ids: Tensor, expert_weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Returns out [T, D] in the dtype of hidden [T, D].

    Args:
        hidden: [T, D].
        expert_ids: [T, K] int32, distinct within a token.
        expert_weights: [T, K] float32.
        gate_up: [E, 2F, D], gate rows first.
        down: [E, D, F].
    """
    return _sum_over_experts(
        hidden.float(),
        expert_ids,
        expert_weights,
        gate_up=lambda e: gate_up[e].float(),
        down=lambda e: down[e].float(),
        round_activations=lambda x: x.to(hidden.dtype).float(),
    ).to(hidden.dtype)


def fp8_moe_experts(
    hidden: Tensor,
    expert_ids: Tensor,
    expert_weights: Tensor,
    gate_up: Tensor,
    gate_up_scale: Tensor,
    down: Tensor,
    down_scale: Tensor,
) -> Tensor:
    """As `moe_experts` with E4M3 weights, row scales [E, 2F] and [E, D] float32, activations rounded to FP8 rows."""
    return _sum_over_experts(
        fake_quantize_rows(hidden),
        expert_ids,
        expert_weights,
        gate_up=lambda e: dequantize_rows(gate_up[e], gate_up_scale[e]),
        down=lambda e: dequantize_rows(down[e], down_scale[e]),
        round_activations=lambda x: fake_quantize_rows(x.to(hidden.dtype)),
    ).to(hidden.dtype)


def _sum_over_experts(
    x_TD: Tensor,
    expert_ids_TK: Tensor,
    expert_weights_TK: Tensor,
    *,
    gate_up: Callable[[int], Tensor],
    down: Callable[[int], Tensor],
    round_activations: Callable[[Tensor], Tensor],
) -> Tensor:
    out_TD = torch.zeros_like(x_TD)
    for e in expert_ids_TK.unique().tolist():
        token, slot = (expert_ids_TK == e).nonzero(as_tuple=True)
        gate, up = F.linear(x_TD[token], gate_up(e)).chunk(2, dim=-1)
        y = F.linear(round_activations(F.silu(gate) * up), down(e))
        out_TD.index_add_(0, token, y * expert_weights_TK[token, slot, None])
    return out_TD
