"""What one token of a Glm4Moe model costs at least: bytes of weights to read, and operations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self


@dataclass(frozen=True, kw_only=True, slots=True)
class Format:
    """Bytes per element: of the projections and experts, of the head, of the router; and per output channel but the
    head's."""

    linear: float
    head: float
    router: float
    channel: float


FORMATS = {
    "bf16": Format(linear=2, head=2, router=4, channel=0),
    "q8_0": Format(linear=34 / 32, head=34 / 32, router=4, channel=0),  # 32 bytes and a float16 scale
    "fp8": Format(linear=1, head=2, router=4, channel=4),
    "fp8-head": Format(linear=1, head=1, router=4, channel=4),  # as q8_0 has its head
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """Elements that one token meets: attention, dense layers, shared experts and the chosen experts."""

    linear: int
    channels: int
    """Output channels of those."""
    router: int
    head: int
    attention: int
    """Multiply-adds of scores and values per visible position."""

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Self:
        D, A, F = config["hidden_size"], config["head_dim"], config["moe_intermediate_size"]
        H, J, layers = (config[f"num_{name}"] for name in ("attention_heads", "key_value_heads", "hidden_layers"))
        dense = config["first_k_dense_replace"]
        active = config["num_experts_per_tok"] + config["n_shared_experts"]
        # [output channels, input channels], and how often per token
        products = [
            (((H + 2 * J) * A, D), layers),
            ((D, H * A), layers),
            ((2 * config["intermediate_size"], D), dense),
            ((D, config["intermediate_size"]), dense),
            ((2 * F, D), active * (layers - dense)),
            ((D, F), active * (layers - dense)),
        ]
        return cls(
            linear=sum(rows * columns * times for (rows, columns), times in products),
            channels=sum(rows * times for (rows, _), times in products),
            router=config["n_routed_experts"] * D * (layers - dense),
            head=config["vocab_size"] * D,
            attention=2 * H * A * layers,
        )

    def decode_bytes(self, weights: str) -> float:
        """Of weights per decoded token at batch 1. The KV cache of a short context is left out: half a percent."""
        stored = FORMATS[weights]
        channels = self.channels * stored.channel
        return self.linear * stored.linear + channels + self.router * stored.router + self.head * stored.head

    def prefill_flops(self, prompt: int) -> float:
        """Per prompt token; the head works for the last one only."""
        visible = (prompt + 1) / 2
        return 2 * (self.linear + self.router + self.attention * visible + self.head / prompt)
