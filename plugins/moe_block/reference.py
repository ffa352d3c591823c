"""A MoE layer from its norm to the next one, rounded wherever the ops that it consists of round."""

from __future__ import annotations

from torch import Tensor

from glm_export.plugins.linear.reference import fp8_linear, linear
from glm_export.plugins.moe_experts.reference import fp8_moe_experts, moe_experts
from glm_export.plugins.moe_router.reference import moe_router
from glm_export.plugins.residual_add.reference import residual_add
from glm_export.plugins.rms_norm.reference import add_rms_norm
from glm_export.plugins.silu_mul.reference import silu_mul


def moe_block(
    x: Tensor,
    router_weight: Tensor,
    correction_bias: Tensor,
    gate_up: Tensor,
    down: Tensor,
    shared_gate: Tensor,
    shared_up: Tensor,
    shared_down: Tensor,
    residual: Tensor,
    norm_weight: Tensor,
    top_k: int,
    n_group: int,
    topk_group: int,
    norm_topk_prob: int,
    routed_scaling_factor: float,
    epsilon: float,
) -> tuple[Tensor, Tensor]:
    """Returns sum and y, both [B, S, D] in the dtype of x [B, S, D].

    Args:
        x: [B, S, D].
        router_weight: [E, D] float32.
        correction_bias: [E] float32; with the attributes as `moe_router` has them.
        gate_up: [E, 2F, D], gate rows first.
        down: [E, D, F].
        shared_gate: [N, D], N being F times the number of shared experts.
        shared_up: [N, D].
        shared_down: [D, N].
        residual: [B, S, D], to which the result is added.
        norm_weight: [D] float32.
        top_k: K.
        n_group: groups of consecutive experts.
        topk_group: groups a token may use.
        norm_topk_prob: 1 to divide the weights by their sum.
        routed_scaling_factor: multiplies the weights after that.
        epsilon: of the norm.
    """
    x_TD = x.flatten(0, -2)
    attributes = (top_k, n_group, topk_group, norm_topk_prob, routed_scaling_factor)
    routing = moe_router(linear(x_TD.float(), router_weight), correction_bias, *attributes)
    routed_TD = moe_experts(x_TD, *routing, gate_up, down)
    shared = linear(silu_mul(linear(x, shared_gate), linear(x, shared_up)), shared_down)
    return add_rms_norm(residual, residual_add(routed_TD.view_as(x), shared), norm_weight, epsilon)


def fp8_moe_block(
    x: Tensor,
    router_weight: Tensor,
    correction_bias: Tensor,
    gate_up: Tensor,
    gate_up_scale: Tensor,
    down: Tensor,
    down_scale: Tensor,
    shared_gate: Tensor,
    shared_gate_scale: Tensor,
    shared_up: Tensor,
    shared_up_scale: Tensor,
    shared_down: Tensor,
    shared_down_scale: Tensor,
    residual: Tensor,
    norm_weight: Tensor,
    top_k: int,
    n_group: int,
    topk_group: int,
    norm_topk_prob: int,
    routed_scaling_factor: float,
    epsilon: float,
) -> tuple[Tensor, Tensor]:
    """As `moe_block` with E4M3 weights and their row scales, float32: [E, 2F], [E, D], [N], [N] and [D]."""
    x_TD = x.flatten(0, -2)
    attributes = (top_k, n_group, topk_group, norm_topk_prob, routed_scaling_factor)
    routing = moe_router(linear(x_TD.float(), router_weight), correction_bias, *attributes)
    routed_TD = fp8_moe_experts(x_TD, *routing, gate_up, gate_up_scale, down, down_scale)
    gate, up = fp8_linear(x, shared_gate, shared_gate_scale), fp8_linear(x, shared_up, shared_up_scale)
    shared = fp8_linear(silu_mul(gate, up), shared_down, shared_down_scale)
    return add_rms_norm(residual, residual_add(routed_TD.view_as(x), shared), norm_weight, epsilon)
