"""The model's parameters: names, shapes, order, and the checkpoint tensors each is gathered from.

Names are those of Hugging Face, with the experts of a layer packed into two tensors (gate rows before up rows), the way
transformers holds them in memory. Checkpoints store experts one by one, which `parts` spells out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from glm_export.exporter.config import Glm4MoeConfig

Kind = Literal["embedding", "lm_head", "norm", "bias", "router", "router_bias", "linear", "experts"]

QUANTIZED: dict[str, tuple[Kind, ...]] = {"fp8": ("linear", "experts"), "fp8-head": ("linear", "experts", "lm_head")}
"""Precision -> the kinds of parameters that it stores as E4M3 with one float32 scale per output channel."""

LAYER_PREFIX = "model.layers."

TIED = {"lm_head.weight": "model.embed_tokens.weight"}
"""With tie_word_embeddings: a parameter that has no tensor of its own, and whose tensor it shares."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Parameter:
    """One tensor of the model.

    Shapes: linear, router, embedding and lm_head [out, in]; norm, bias and router_bias [width];
    experts [E, 2F, D] (gate_up_proj) or [E, D, F] (down_proj).
    """

    name: str
    shape: tuple[int, ...]
    kind: Kind

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def group(self) -> str:
        """The weight file it belongs to: "embed", "layer-000" and so on, "head"."""
        if self.kind == "embedding":
            return "embed"
        layer = layer_index(self.name)
        return "head" if layer is None else f"layer-{layer:03d}"


def layer_index(name: str) -> int | None:
    """The layer number in a tensor name, or None for a tensor outside the layers."""
    if not name.startswith(LAYER_PREFIX):
        return None
    number = name.removeprefix(LAYER_PREFIX).partition(".")[0]
    # Only the canonical spelling is a number: "007" would be a second name of layer 7.
    return int(number) if re.fullmatch("0|[1-9][0-9]{0,8}", number) else None


def parameters(config: Glm4MoeConfig) -> dict[str, Parameter]:
    """Every parameter in model order, by name; q, k, v are neighbours, and so are gate and up."""
    D, V = config.hidden_size, config.vocab_size
    found = [
        Parameter(name="model.embed_tokens.weight", shape=(V, D), kind="embedding"),
        *(parameter for i in range(config.num_hidden_layers) for parameter in _layer(config, i)),
        Parameter(name="model.norm.weight", shape=(D,), kind="norm"),
    ]
    if not config.tie_word_embeddings:  # else the head is the embedding, see TIED
        found.append(Parameter(name="lm_head.weight", shape=(V, D), kind="lm_head"))
    return {parameter.name: parameter for parameter in found}


def mtp_parameters(config: Glm4MoeConfig, *, duplicates: bool = False) -> dict[str, Parameter]:
    """The parameters of the multi-token-prediction layers: a MoE decoder layer each, and what feeds and ends it.

    Args:
        config: the architecture.
        duplicates: with the copies of embedding and head that some releases store in such a layer.
    """
    D, V = config.hidden_size, config.vocab_size
    found: list[Parameter] = []
    for i in config.mtp_layers:
        prefix = f"{LAYER_PREFIX}{i}"
        found += _layer(config, i)
        found += [
            Parameter(name=f"{prefix}.enorm.weight", shape=(D,), kind="norm"),
            Parameter(name=f"{prefix}.hnorm.weight", shape=(D,), kind="norm"),
            Parameter(name=f"{prefix}.eh_proj.weight", shape=(D, 2 * D), kind="linear"),
            Parameter(name=f"{prefix}.shared_head.norm.weight", shape=(D,), kind="norm"),
        ]
        if duplicates:
            found += [
                Parameter(name=f"{prefix}.embed_tokens.weight", shape=(V, D), kind="embedding"),
                Parameter(name=f"{prefix}.shared_head.head.weight", shape=(V, D), kind="lm_head"),
            ]
    return {parameter.name: parameter for parameter in found}


def groups(config: Glm4MoeConfig) -> dict[str, tuple[Parameter, ...]]:
    """The parameters of each weight file, files and parameters in model order."""
    found: dict[str, list[Parameter]] = {}
    for parameter in parameters(config).values():
        found.setdefault(parameter.group, []).append(parameter)
    return {group: tuple(members) for group, members in found.items()}


def parts(parameter: Parameter) -> dict[str, tuple[int, ...]]:
    """The checkpoint tensors (name and shape) that make up a parameter, in order; experts one by one."""
    if parameter.kind != "experts":
        return {parameter.name: parameter.shape}
    return {name: shape for e in range(parameter.shape[0]) for name, shape in expert_parts(parameter, e).items()}


def expert_parts(parameter: Parameter, e: int) -> dict[str, tuple[int, ...]]:
    """The checkpoint tensors of expert `e`: gate and up [F, D] each, or down [D, F]."""
    prefix, _, last = parameter.name.rpartition(".")
    _, rows, columns = parameter.shape
    if last == "down_proj":
        return {f"{prefix}.{e}.down_proj.weight": (rows, columns)}
    return {f"{prefix}.{e}.{half}_proj.weight": (rows // 2, columns) for half in ("gate", "up")}


def _layer(config: Glm4MoeConfig, i: int) -> Iterator[Parameter]:
    D, A = config.hidden_size, config.head_dim
    H, J = config.num_attention_heads, config.num_key_value_heads

    def make(name: str, kind: Kind, *shape: int) -> Parameter:
        return Parameter(name=f"{LAYER_PREFIX}{i}.{name}", shape=shape, kind=kind)

    def mlp(prefix: str, width: int) -> Iterator[Parameter]:
        yield make(f"{prefix}.gate_proj.weight", "linear", width, D)
        yield make(f"{prefix}.up_proj.weight", "linear", width, D)
        yield make(f"{prefix}.down_proj.weight", "linear", D, width)

    heads = {"q": H, "k": J, "v": J}
    yield make("input_layernorm.weight", "norm", D)
    for letter, count in heads.items():
        yield make(f"self_attn.{letter}_proj.weight", "linear", count * A, D)
    if config.attention_bias:
        for letter, count in heads.items():
            yield make(f"self_attn.{letter}_proj.bias", "bias", count * A)
    yield make("self_attn.o_proj.weight", "linear", D, H * A)
    if config.use_qk_norm:
        yield make("self_attn.q_norm.weight", "norm", A)
        yield make("self_attn.k_norm.weight", "norm", A)
    yield make("post_attention_layernorm.weight", "norm", D)
    if not config.is_moe_layer(i):
        yield from mlp("mlp", config.intermediate_size)
        return
    E, F = config.n_routed_experts, config.moe_intermediate_size
    yield make("mlp.gate.weight", "router", E, D)
    yield make("mlp.gate.e_score_correction_bias", "router_bias", E)
    yield make("mlp.experts.gate_up_proj", "experts", E, 2 * F, D)
    yield make("mlp.experts.down_proj", "experts", E, D, F)
    yield from mlp("mlp.shared_experts", F * config.n_shared_experts)
