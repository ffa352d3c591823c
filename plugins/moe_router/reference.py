"""The router of Glm4MoeForCausalLM (transformers 5.23, Glm4MoeTopkRouter), float32 throughout."""

from __future__ import annotations

import torch
from torch import Tensor


def moe_router(
    logits: Tensor,
    correction_bias: Tensor,
    top_k: int,
    n_group: int,
    topk_group: int,
    norm_topk_prob: int,
    routed_scaling_factor: float,
) -> tuple[Tensor, Tensor]:
    """Chooses K experts per token.

    Args:
        logits: [T, E] float32.
        correction_bias: [E] float32. It takes part in choosing; the weights are the unbiased scores.
        top_k: K.
        n_group: groups of E / n_group consecutive experts; a group's score is the sum of its two best experts.
        topk_group: a token chooses among the experts of its best topk_group groups.
        norm_topk_prob: 1 to divide the weights by their sum + 1e-20.
        routed_scaling_factor: multiplies the weights after that.

    Returns:
        expert_ids [T, K] int32, best first, and expert_weights [T, K] float32. transformers leaves the order of experts
        and ties unspecified; here the lowest id (and the lowest group) wins.
    """
    scores_TE = logits.sigmoid()
    choice_TE = scores_TE + correction_bias
    choice_TGI = choice_TE.unflatten(-1, (n_group, -1))

    group_scores_TG = choice_TGI.topk(min(2, choice_TGI.shape[-1]), dim=-1).values.sum(dim=-1)
    groups = _stable_top_k(group_scores_TG, topk_group)
    keep_TG = torch.zeros_like(group_scores_TG, dtype=torch.bool).scatter(1, groups, True)
    choice_TE = choice_TGI.masked_fill(~keep_TG[..., None], float("-inf")).flatten(-2)

    expert_ids_TK = _stable_top_k(choice_TE, top_k)
    weights_TK = scores_TE.gather(1, expert_ids_TK)
    if norm_topk_prob:
        weights_TK = weights_TK / (weights_TK.sum(dim=-1, keepdim=True) + 1e-20)
    return expert_ids_TK.int(), weights_TK * routed_scaling_factor


def _stable_top_k(x: Tensor, k: int) -> Tensor:
    """Indices [..., k] of the k largest; among equals the lowest index, which torch.topk does not promise."""
    return x.sort(dim=-1, descending=True, stable=True).indices[..., :k]
