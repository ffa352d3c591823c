"""Attention and all that follows up to the next norm, rounded wherever the ops that it consists of round."""

from __future__ import annotations

from torch import Tensor

from glm_export.plugins.cached_attention.reference import cached_attention
from glm_export.plugins.linear.reference import fp8_linear, linear
from glm_export.plugins.rms_norm.reference import add_rms_norm


def attention_block(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    write_index: Tensor,
    length: Tensor,
    o_weight: Tensor,
    o_bias: Tensor | None,
    residual: Tensor,
    norm_weight: Tensor,
    rotary_dim: int,
    scale: float,
    epsilon: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns sum and y, both [B, S, D] in the dtype of q, and the caches.

    Args:
        q: [B, S, H, A], and so on up to `length` as `cached_attention` has them.
        k: [B, S, J, A].
        v: [B, S, J, A].
        cos: [B, S, rotary_dim / 2] float32.
        sin: likewise.
        k_cache: [B, J, C, A].
        v_cache: [B, J, C, A].
        write_index: [B] int64.
        length: [B] int64.
        o_weight: [D, H * A] in any floating dtype.
        o_bias: [D] float32, or None.
        residual: [B, S, D].
        norm_weight: [D] float32.
        rotary_dim: leading elements of a head that are rotated.
        scale: multiplies the scores.
        epsilon: of the norm.
    """
    out, *caches, _ = cached_attention(q, k, v, cos, sin, k_cache, v_cache, write_index, length, rotary_dim, scale)
    update = linear(out.flatten(-2), o_weight, o_bias)
    return *add_rms_norm(residual, update, norm_weight, epsilon), caches[0], caches[1]


def fp8_attention_block(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    write_index: Tensor,
    length: Tensor,
    o_weight: Tensor,
    o_scale: Tensor,
    o_bias: Tensor | None,
    residual: Tensor,
    norm_weight: Tensor,
    rotary_dim: int,
    scale: float,
    epsilon: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `attention_block` with an E4M3 weight and its row scales [D] float32; what it multiplies is rounded to FP8."""
    out, *caches, _ = cached_attention(q, k, v, cos, sin, k_cache, v_cache, write_index, length, rotary_dim, scale)
    update = fp8_linear(out.flatten(-2), o_weight, o_scale, o_bias)
    return *add_rms_norm(residual, update, norm_weight, epsilon), caches[0], caches[1]
