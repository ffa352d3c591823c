from __future__ import annotations

from torch import Tensor

from glm_export.plugins.linear.reference import fp8_linear, linear


def qkv_linear(
    x: Tensor,
    q_weight: Tensor,
    q_bias: Tensor | None,
    k_weight: Tensor,
    k_bias: Tensor | None,
    v_weight: Tensor,
    v_bias: Tensor | None,
    head_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns q, k and v, [B, S, H, A] and twice [B, S, J, A], in the dtype of x [B, S, D].

    Args:
        x: [B, S, D].
        q_weight: [H * A, D] in any floating dtype.
        q_bias: [H * A] float32, or None.
        k_weight: [J * A, D].
        k_bias: [J * A] float32, or None.
        v_weight: [J * A, D].
        v_bias: [J * A] float32, or None.
        head_size: A.
    """
    parts = ((q_weight, q_bias), (k_weight, k_bias), (v_weight, v_bias))
    q, k, v = (linear(x, weight, bias).unflatten(-1, (-1, head_size)) for weight, bias in parts)
    return q, k, v


def fp8_qkv_linear(
    x: Tensor,
    q_weight: Tensor,
    q_scale: Tensor,
    q_bias: Tensor | None,
    k_weight: Tensor,
    k_scale: Tensor,
    k_bias: Tensor | None,
    v_weight: Tensor,
    v_scale: Tensor,
    v_bias: Tensor | None,
    head_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `qkv_linear` with E4M3 weights and their row scales, float32; x is rounded to FP8 per row."""
    parts = ((q_weight, q_scale, q_bias), (k_weight, k_scale, k_bias), (v_weight, v_scale, v_bias))
    q, k, v = (fp8_linear(x, weight, scale, bias).unflatten(-1, (-1, head_size)) for weight, scale, bias in parts)
    return q, k, v
