"""The contract between bundle and runtime: the only place that knows binding names, dtypes, shapes and their order.

The tracer names the graph's inputs and outputs from it, the manifest stores it, every session binds by it.

Letters: B batch, S new tokens, C cache capacity, T = B*S tokens, D hidden, J key/value heads, H query heads,
A head size, E experts, V vocabulary. B, S, C and T are free; the others are numbers of the model.

    binding                    shape            dtype     meaning
    input_ids                  [B,S]            int64     new tokens, right-padded
    inputs_embeds              [B,S,D]          compute   instead of input_ids, chosen at export
    write_index                [B]              int64     tokens already in the cache, per row
    length                     [B]              int64     valid tokens after this step, per row
    k_cache.{i}, v_cache.{i}   [B,J,C,A]        cache     finite everywhere (zero-filled before first use)
    logits                     [B,V] or [B,S,V] float32   of each row's last valid token, or of all new tokens
    k_cache_out.{i}, v_cache_out.{i}                      bound to the buffer of the input: the update is in place
    hidden_states.{i}          [B,S,D]          compute   optional: embeddings, then each layer; the last is post-norm
    router_logits.{i}          [T,E]            float32   optional: MoE layers, before sigmoid and bias
    attentions.{i}             [B,H,S,C]        float32   optional: attention probabilities, zero where unseen

A step writes positions write_index .. write_index+S-1 of each row, padding included, so write_index + S <= C must hold
for every row; targets drop a write beyond that without a word, therefore the session checks it first. What lies in the
cache at or after `length`, and what is computed for padding tokens, is unspecified (but finite).

Caches are in the compute dtype, unless a session is asked for another one (`cache_dtype`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Dim = int | str
LogitsMode = Literal["last", "all"]

COMPUTE_DTYPES = {
    "fp32": "float32",
    "bf16": "bfloat16",
    "fp16": "float16",
    "fp8": "bfloat16",
    "fp8-head": "bfloat16",
}
"""Precision of a bundle -> dtype of its activations, and of its KV cache unless a session asks for another."""

CACHE_DTYPES = ("float32", "bfloat16")
"""What a session's KV cache may be in, whatever the compute dtype; that one is possible too."""

OPTIONAL_OUTPUTS = ("hidden_states", "router_logits", "attentions")


@dataclass(frozen=True, kw_only=True, slots=True)
class Binding:
    """One input or output of an engine."""

    name: str
    shape: tuple[Dim, ...]
    dtype: str
    meaning: str
    in_place_of: str | None = None
    """For an output: the input whose buffer it must be bound to."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Contract:
    """The numbers and export choices that fix an engine's bindings."""

    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    hidden_size: int
    vocab_size: int
    n_routed_experts: int
    first_k_dense_replace: int
    compute_dtype: str
    logits: LogitsMode = "last"
    inputs_embeds: bool = False
    outputs: tuple[str, ...] = ()
    """Any of OPTIONAL_OUTPUTS, in that order."""

    def inputs(self, cache_dtype: str | None = None) -> tuple[Binding, ...]:
        """The inputs in engine order; cache_dtype as for `caches`."""
        if self.inputs_embeds:
            tokens = Binding(
                name="inputs_embeds",
                shape=("B", "S", self.hidden_size),
                dtype=self.compute_dtype,
                meaning="embeddings of the new tokens, right-padded",
            )
        else:
            tokens = Binding(name="input_ids", shape=("B", "S"), dtype="int64", meaning="new tokens, right-padded")
        return (
            tokens,
            Binding(name="write_index", shape=("B",), dtype="int64", meaning="tokens already in the cache"),
            Binding(name="length", shape=("B",), dtype="int64", meaning="valid tokens after this step"),
            *self.caches(cache_dtype),
        )

    def caches(self, cache_dtype: str | None = None) -> tuple[Binding, ...]:
        """The KV-cache inputs: k_cache.0, v_cache.0, k_cache.1, ...; in the compute dtype when cache_dtype is None."""
        shape: tuple[Dim, ...] = ("B", self.num_key_value_heads, "C", self.head_dim)
        return tuple(
            Binding(
                name=f"{kind}_cache.{i}",
                shape=shape,
                dtype=cache_dtype or self.compute_dtype,
                meaning=f"{word} of layer {i}",
            )
            for i in range(self.num_hidden_layers)
            for kind, word in (("k", "rotated keys"), ("v", "values"))
        )

    def outputs_of_step(self, cache_dtype: str | None = None) -> tuple[Binding, ...]:
        """The outputs in engine order: logits, caches, then the optional ones; cache_dtype as for `caches`."""
        logits_shape: tuple[Dim, ...] = ("B", "S", self.vocab_size) if self.logits == "all" else ("B", self.vocab_size)
        meaning = "of all new tokens" if self.logits == "all" else "of each row's last valid token"
        return (
            Binding(name="logits", shape=logits_shape, dtype="float32", meaning=meaning),
            *(
                Binding(
                    name=cache.name.replace("_cache.", "_cache_out."),
                    shape=cache.shape,
                    dtype=cache.dtype,
                    meaning=f"{cache.meaning}, updated",
                    in_place_of=cache.name,
                )
                for cache in self.caches(cache_dtype)
            ),
            *(binding for kind in OPTIONAL_OUTPUTS if kind in self.outputs for binding in self._optional(kind)),
        )

    def _optional(self, kind: str) -> tuple[Binding, ...]:
        layers = range(self.num_hidden_layers)
        if kind == "hidden_states":
            return tuple(
                Binding(
                    name=f"hidden_states.{i}",
                    shape=("B", "S", self.hidden_size),
                    dtype=self.compute_dtype,
                    meaning="embeddings"
                    if i == 0
                    else f"after layer {i - 1}" + (", normed" if i == len(layers) else ""),
                )
                for i in range(len(layers) + 1)
            )
        if kind == "router_logits":
            return tuple(
                Binding(
                    name=f"router_logits.{i}",
                    shape=("T", self.n_routed_experts),
                    dtype="float32",
                    meaning=f"router of layer {i}, before sigmoid and bias",
                )
                for i in layers
                if i >= self.first_k_dense_replace
            )
        return tuple(
            Binding(
                name=f"attentions.{i}",
                shape=("B", self.num_attention_heads, "S", "C"),
                dtype="float32",
                meaning=f"attention probabilities of layer {i}",
            )
            for i in layers
        )
