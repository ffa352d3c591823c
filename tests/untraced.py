"""The references of the ops that are no torch ops, because only prepared graphs have them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from glm_export.plugins.attention_block.reference import attention_block, fp8_attention_block
from glm_export.plugins.fp8_cache_write.reference import fp8_cache_write
from glm_export.plugins.logits.reference import fp8_logits, logits
from glm_export.plugins.moe_block.reference import fp8_moe_block, moe_block
from glm_export.plugins.qkv_linear.reference import fp8_qkv_linear, qkv_linear

REFERENCES: dict[str, Callable[..., Any]] = {
    "FP8CacheWrite": fp8_cache_write,
    "QkvLinear": qkv_linear,
    "FP8QkvLinear": fp8_qkv_linear,
    "AttentionBlock": attention_block,
    "FP8AttentionBlock": fp8_attention_block,
    "MoEBlock": moe_block,
    "FP8MoEBlock": fp8_moe_block,
    "Logits": logits,
    "FP8Logits": fp8_logits,
}
