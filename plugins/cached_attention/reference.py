"""Partial RoPE, cache write and causal grouped-query attention."""

from __future__ import annotations

import torch
from torch import Tensor


def cached_attention(
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
    """One attention step over a cache.

    Args:
        q: [B, S, H, A].
        k: [B, S, J, A]; query head h uses key/value head h // (H/J).
        v: [B, S, J, A].
        cos: [B, S, R] float32, R = rotary_dim / 2.
        sin: [B, S, R] float32.
        k_cache: [B, J, C, A], in any compute dtype: k is rounded to it when it is written.
        v_cache: [B, J, C, A], in the dtype of k_cache; likewise.
        write_index: [B] int64; position of each row's first new token. write_index + S must not exceed C.
        length: [B] int64; only tells kernels which tokens are padding, this reference computes them all the same.
        rotary_dim: leading elements of a head that are rotated, half split ("NeoX").
        scale: multiplies the scores.

    Returns:
        out [B, S, H, A] in the dtype of q, k_cache and v_cache with the new tokens written (the reference copies them),
        and the attention probabilities [B, H, S, C] float32.
    """
    B, S, H, A = q.shape
    J, C = k_cache.shape[1:3]

    q = _rotate(q, cos, sin, rotary_dim).to(q.dtype)
    k = _rotate(k, cos, sin, rotary_dim).to(k_cache.dtype)
    position_BS = write_index[:, None] + torch.arange(S, device=q.device)
    row_B1 = torch.arange(B, device=q.device)[:, None]
    k_cache, v_cache = k_cache.clone(), v_cache.clone()
    k_cache[row_B1, :, position_BS] = k
    v_cache[row_B1, :, position_BS] = v.to(v_cache.dtype)

    q_BJGSA = q.float().view(B, S, J, H // J, A).permute(0, 2, 3, 1, 4)
    scores_BJGSC = q_BJGSA @ k_cache.float()[:, :, None].mT * scale
    visible_BSC = torch.arange(C, device=q.device) <= position_BS[..., None]
    scores_BJGSC = scores_BJGSC.masked_fill(~visible_BSC[:, None, None], float("-inf"))
    probs_BJGSC = scores_BJGSC.softmax(dim=-1)
    out_BJGSA = probs_BJGSC @ v_cache.float()[:, :, None]
    out_BSHA = out_BJGSA.permute(0, 3, 1, 2, 4).reshape(B, S, H, A).contiguous()
    return out_BSHA.to(q.dtype), k_cache, v_cache, probs_BJGSC.reshape(B, H, S, C)


def _rotate(x_BSNA: Tensor, cos_BSR: Tensor, sin_BSR: Tensor, rotary_dim: int) -> Tensor:
    """RoPE on the first rotary_dim elements of every head, the rest passes through; float32."""
    x1, x2, passed = x_BSNA.float().tensor_split((rotary_dim // 2, rotary_dim), dim=-1)
    cos, sin = cos_BSR[:, :, None], sin_BSR[:, :, None]
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin, passed), dim=-1)
