"""Glm4MoeForCausalLM in plain PyTorch: the definition every engine is judged against. Read it downwards.

It is slow and exact: the arithmetic is in the `glm` ops (float32 inside, one rounding per op), so what is traced is
what is tested. Parameters carry the Hugging Face names, with the experts of a layer packed into one tensor. Precision
is a matter of dtypes alone: fp32, bf16, fp16, fp8 (E4M3 weights with row scales, activations quantized per token), or
fp8-head (the head so, too).

Letters: B batch, S new tokens, C cache capacity, T = B*S tokens, D hidden, H query heads, J key/value heads, A head
size, R = rotary_dim / 2, F expert width, E experts, K chosen, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glm_export.exporter.config import Glm4MoeConfig
from glm_export.exporter.precision import compute_dtype, storage_dtype
from glm_export.plugins import torch_ops as ops


def _parameter(precision: str, kind: str, *shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=storage_dtype(precision, kind)), requires_grad=False)


class RMSNorm(nn.Module):
    def __init__(self, precision: str, size: int, epsilon: float) -> None:
        super().__init__()
        self.weight = _parameter(precision, "norm", size)
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.epsilon)


class Linear(nn.Module):
    """weight [out, in] of the precision, bias [out] float32; in fp8 also weight_scale [out]."""

    def __init__(self, precision: str, kind: str, in_features: int, out_features: int, *, bias: bool = False) -> None:
        super().__init__()
        self.weight = _parameter(precision, kind, out_features, in_features)
        self.fp8 = self.weight.dtype == torch.float8_e4m3fn
        if self.fp8:
            self.weight_scale = _parameter(precision, "bias", out_features)
        self.bias = _parameter(precision, "bias", out_features) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        if self.fp8:
            return ops.fp8_linear(x, self.weight, self.weight_scale, self.bias)
        return ops.linear(x, self.weight, self.bias)


class RotaryEmbedding(nn.Module):
    """cos and sin of every position's angles, float32: theta^(-2r / rotary_dim), over rotary_dim and not head_dim."""

    def __init__(self, config: Glm4MoeConfig) -> None:
        super().__init__()
        self.rotary_dim = config.rotary_dim
        self.theta = config.rope_theta

    def forward(self, position_BS: Tensor) -> tuple[Tensor, Tensor]:
        exponent_R = (
            torch.arange(0, self.rotary_dim, 2, dtype=torch.float32, device=position_BS.device) / self.rotary_dim
        )
        inv_freq_R = 1.0 / self.theta**exponent_R
        angle_BSR = position_BS.unsqueeze(-1).float() * inv_freq_R
        return angle_BSR.cos(), angle_BSR.sin()


class Attention(nn.Module):
    def __init__(self, config: Glm4MoeConfig, precision: str) -> None:
        super().__init__()
        D, H, J, A = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.head_dim = A
        self.rotary_dim = config.rotary_dim
        self.q_proj = Linear(precision, "linear", D, H * A, bias=config.attention_bias)
        self.k_proj = Linear(precision, "linear", D, J * A, bias=config.attention_bias)
        self.v_proj = Linear(precision, "linear", D, J * A, bias=config.attention_bias)
        self.o_proj = Linear(precision, "linear", H * A, D)  # never has a bias, whatever attention_bias says
        self.use_qk_norm = config.use_qk_norm
        if self.use_qk_norm:
            self.q_norm = RMSNorm(precision, A, config.rms_norm_eps)
            self.k_norm = RMSNorm(precision, A, config.rms_norm_eps)

    def forward(
        self,
        x_BSD: Tensor,
        rope: tuple[Tensor, Tensor],
        cache: tuple[Tensor, Tensor],
        write_index_B: Tensor,
        length_B: Tensor,
    ) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
        q_BSHA = self.q_proj(x_BSD).unflatten(-1, (-1, self.head_dim))
        k_BSJA = self.k_proj(x_BSD).unflatten(-1, (-1, self.head_dim))
        v_BSJA = self.v_proj(x_BSD).unflatten(-1, (-1, self.head_dim))
        if self.use_qk_norm:
            q_BSHA, k_BSJA = self.q_norm(q_BSHA), self.k_norm(k_BSJA)
        out_BSHA, k_cache_BJCA, v_cache_BJCA, attentions_BHSC = ops.cached_attention(
            q_BSHA,
            k_BSJA,
            v_BSJA,
            *rope,
            *cache,
            write_index_B,
            length_B,
            self.rotary_dim,
            self.head_dim**-0.5,
        )
        return self.o_proj(out_BSHA.flatten(-2)), (k_cache_BJCA, v_cache_BJCA), attentions_BHSC


class MLP(nn.Module):
    """Dense layers and the shared expert: down(silu(gate(x)) * up(x))."""

    def __init__(self, precision: str, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = Linear(precision, "linear", hidden_size, intermediate_size)
        self.up_proj = Linear(precision, "linear", hidden_size, intermediate_size)
        self.down_proj = Linear(precision, "linear", intermediate_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down_proj(ops.silu_mul(self.gate_proj(x), self.up_proj(x)))
        return y


class Router(nn.Module):
    """Sigmoid router with a correction bias, float32 throughout: rounding here changes which experts run."""

    def __init__(self, config: Glm4MoeConfig, precision: str) -> None:
        super().__init__()
        self.config = config
        self.weight = _parameter(precision, "router", config.n_routed_experts, config.hidden_size)
        self.e_score_correction_bias = _parameter(precision, "router_bias", config.n_routed_experts)

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits_TE = ops.linear(x_TD.float(), self.weight)
        expert_ids_TK, expert_weights_TK = ops.moe_router(
            logits_TE,
            self.e_score_correction_bias,
            self.config.num_experts_per_tok,
            self.config.n_group,
            self.config.topk_group,
            int(self.config.norm_topk_prob),
            self.config.routed_scaling_factor,
        )
        return expert_ids_TK, expert_weights_TK, logits_TE


class Experts(nn.Module):
    """gate_up_proj [E, 2F, D] (gate rows first) and down_proj [E, D, F]; in fp8 with scales [E, 2F] and [E, D]."""

    def __init__(self, config: Glm4MoeConfig, precision: str) -> None:
        super().__init__()
        E, D, F_ = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = _parameter(precision, "experts", E, 2 * F_, D)
        self.down_proj = _parameter(precision, "experts", E, D, F_)
        self.fp8 = self.gate_up_proj.dtype == torch.float8_e4m3fn
        if self.fp8:
            self.gate_up_proj_scale = _parameter(precision, "bias", E, 2 * F_)
            self.down_proj_scale = _parameter(precision, "bias", E, D)

    def forward(self, x_TD: Tensor, expert_ids_TK: Tensor, expert_weights_TK: Tensor) -> Tensor:
        if self.fp8:
            return ops.fp8_moe_experts(
                x_TD,
                expert_ids_TK,
                expert_weights_TK,
                self.gate_up_proj,
                self.gate_up_proj_scale,
                self.down_proj,
                self.down_proj_scale,
            )
        return ops.moe_experts(x_TD, expert_ids_TK, expert_weights_TK, self.gate_up_proj, self.down_proj)


class MoE(nn.Module):
    """Routed experts plus an ungated, unscaled shared expert, both from the same normed input."""

    def __init__(self, config: Glm4MoeConfig, precision: str) -> None:
        super().__init__()
        self.gate = Router(config, precision)
        self.experts = Experts(config, precision)
        shared_size = config.moe_intermediate_size * config.n_shared_experts
        self.shared_experts = MLP(precision, config.hidden_size, shared_size)

    def forward(self, x_BSD: Tensor) -> tuple[Tensor, Tensor]:
        x_TD = x_BSD.flatten(0, 1)
        expert_ids_TK, expert_weights_TK, router_logits_TE = self.gate(x_TD)
        routed_TD = self.experts(x_TD, expert_ids_TK, expert_weights_TK)
        return ops.residual_add(routed_TD.view_as(x_BSD), self.shared_experts(x_BSD)), router_logits_TE


class DecoderLayer(nn.Module):
    def __init__(self, config: Glm4MoeConfig, precision: str, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(precision, config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, precision)
        self.post_attention_layernorm = RMSNorm(precision, config.hidden_size, config.rms_norm_eps)
        self.mlp: MoE | MLP
        if config.is_moe_layer(layer):
            self.mlp = MoE(config, precision)
        else:
            self.mlp = MLP(precision, config.hidden_size, config.intermediate_size)

    def forward(
        self,
        x_BSD: Tensor,
        rope: tuple[Tensor, Tensor],
        cache: tuple[Tensor, Tensor],
        write_index_B: Tensor,
        length_B: Tensor,
    ) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor, Tensor | None]:
        attended, cache, attentions = self.self_attn(self.input_layernorm(x_BSD), rope, cache, write_index_B, length_B)
        x_BSD = ops.residual_add(x_BSD, attended)
        mixed, router_logits = self.post_attention_layernorm(x_BSD), None
        if isinstance(self.mlp, MoE):
            mixed, router_logits = self.mlp(mixed)
        else:
            mixed = self.mlp(mixed)
        return ops.residual_add(x_BSD, mixed), cache, attentions, router_logits


class Embedding(nn.Module):
    def __init__(self, config: Glm4MoeConfig, precision: str) -> None:
        super().__init__()
        self.weight = _parameter(precision, "embedding", config.vocab_size, config.hidden_size)

    def forward(self, input_ids_BS: Tensor) -> Tensor:
        return F.embedding(input_ids_BS, self.weight)


class Decoder(nn.Module):
    """Everything below the head; its name in the checkpoint is `model`."""

    def __init__(self, config: Glm4MoeConfig, precision: str) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config, precision)
        self.rotary_emb = RotaryEmbedding(config)
        self.layers = nn.ModuleList(DecoderLayer(config, precision, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(precision, config.hidden_size, config.rms_norm_eps)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelOutput:
    """What a forward returns; per-layer tuples follow transformers' conventions."""

    logits: Tensor
    """float32; [B,S,V], or what logits_to_keep selects."""
    caches: tuple[tuple[Tensor, Tensor], ...]
    """(k_cache, v_cache) [B,J,C,A] per layer, with the new tokens written."""
    loss: Tensor | None
    hidden_states: tuple[Tensor, ...]
    """[B,S,D]: the embeddings, then after each layer; the last is normed."""
    router_logits: tuple[Tensor, ...]
    """[T,E] float32 of the MoE layers, before sigmoid and bias."""
    attentions: tuple[Tensor, ...]
    """[B,H,S,C] float32 probabilities."""


class Glm4MoeForCausalLM(nn.Module):
    """The whole model. Construct it under `torch.device("meta")` and give it weights with weights.py."""

    def __init__(self, config: Glm4MoeConfig, precision: str) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype = compute_dtype(precision)
        self.model = Decoder(config, precision)
        self.lm_head = Linear(precision, "lm_head", config.hidden_size, config.vocab_size)

    def empty_caches(
        self, batch: int, capacity: int, dtype: torch.dtype | None = None
    ) -> tuple[tuple[Tensor, Tensor], ...]:
        """Zero-filled (k_cache, v_cache) [B,J,C,A] per layer; in the compute dtype when dtype is None."""
        dtype = dtype or self.compute_dtype
        shape_BJCA = (batch, self.config.num_key_value_heads, capacity, self.config.head_dim)
        return tuple(
            (torch.zeros(shape_BJCA, dtype=dtype), torch.zeros(shape_BJCA, dtype=dtype))
            for _ in range(self.config.num_hidden_layers)
        )

    def forward(
        self,
        input_ids: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        caches: Sequence[tuple[Tensor, Tensor]] | None = None,
        write_index: Tensor | None = None,
        length: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
    ) -> ModelOutput:
        """One step: prefill when the caches are empty, cached decode otherwise.

        Args:
            input_ids: [B, S] int64, right-padded; or
            inputs_embeds: [B, S, D] instead.
            caches: (k_cache, v_cache) [B, J, C, A] per layer; without them a cache of capacity S is made.
            write_index: [B] int64, tokens already in the cache; default 0.
            length: [B] int64, valid tokens after this step; default write_index + S.
            labels: [B, S] int64; loss is the shifted cross entropy over all logits, -100 ignored.
            logits_to_keep: as in transformers: the last n tokens (0: all), a 1-D index into S, 2-D indices [B, n] per
                row, or a 2-D bool mask [B, S] (logits become [n_true, V]).

        Raises:
            ValueError: not exactly one of input_ids and inputs_embeds, or labels together with logits_to_keep.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if labels is not None and not (isinstance(logits_to_keep, int) and logits_to_keep == 0):
            raise ValueError("a loss needs the logits of all tokens: leave logits_to_keep at 0")

        # The weights may be of a narrower dtype than the activations (float32 reference of a bfloat16 checkpoint).
        x_BSD = (self.model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds).to(self.compute_dtype)
        B, S = x_BSD.shape[:2]
        if write_index is None:
            write_index = torch.zeros(B, dtype=torch.int64, device=x_BSD.device)
        if length is None:
            length = write_index + S
        if caches is None:
            caches = self.empty_caches(B, S)
        rope = self.model.rotary_emb(write_index.unsqueeze(1) + torch.arange(S, device=x_BSD.device))

        hidden_states, router_logits, attentions, new_caches = [x_BSD], [], [], []
        for layer, cache in zip(self.model.layers, caches, strict=True):
            x_BSD, new_cache, layer_attentions, layer_router_logits = layer(x_BSD, rope, cache, write_index, length)
            hidden_states.append(x_BSD)
            new_caches.append(new_cache)
            attentions.append(layer_attentions)
            if layer_router_logits is not None:
                router_logits.append(layer_router_logits)
        x_BSD = hidden_states[-1] = self.model.norm(x_BSD)

        logits = self.lm_head(_keep(x_BSD, logits_to_keep).float())
        return ModelOutput(
            logits=logits,
            caches=tuple(new_caches),
            loss=None if labels is None else _loss(logits, labels),
            hidden_states=tuple(hidden_states),
            router_logits=tuple(router_logits),
            attentions=tuple(attentions),
        )


def _keep(x_BSD: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    """The positions whose logits are wanted: [B,n,D], or [n_true,D] for a mask."""
    if isinstance(logits_to_keep, int):
        return x_BSD[:, -logits_to_keep:] if logits_to_keep else x_BSD
    if logits_to_keep.ndim == 1:
        return x_BSD[:, logits_to_keep]
    if logits_to_keep.dtype == torch.bool:
        return x_BSD[logits_to_keep]
    return x_BSD.gather(1, logits_to_keep.unsqueeze(-1).expand(-1, -1, x_BSD.shape[-1]))


def _loss(logits_BSV: Tensor, labels_BS: Tensor) -> Tensor:
    """Mean cross entropy of predicting token s+1 at s."""
    return F.cross_entropy(logits_BSV[:, :-1].flatten(0, 1), labels_BS[:, 1:].flatten(), ignore_index=-100)
