"""The table of all ops. Importing it imports neither torch nor onnx."""

from __future__ import annotations

from glm_export.plugins.attention_block.schema import ATTENTION_BLOCK, FP8_ATTENTION_BLOCK
from glm_export.plugins.cached_attention.schema import CACHED_ATTENTION
from glm_export.plugins.fp8_cache_write.schema import FP8_CACHE_WRITE
from glm_export.plugins.linear.schema import FP8_LINEAR, LINEAR
from glm_export.plugins.logits.schema import FP8_LOGITS, LOGITS
from glm_export.plugins.moe_block.schema import FP8_MOE_BLOCK, MOE_BLOCK
from glm_export.plugins.moe_experts.schema import FP8_MOE_EXPERTS, MOE_EXPERTS
from glm_export.plugins.moe_router.schema import MOE_ROUTER
from glm_export.plugins.qkv_linear.schema import FP8_QKV_LINEAR, QKV_LINEAR
from glm_export.plugins.residual_add.schema import RESIDUAL_ADD
from glm_export.plugins.rms_norm.schema import RMS_NORM
from glm_export.plugins.schema import OpSchema
from glm_export.plugins.silu_mul.schema import SILU_MUL

OPS: dict[str, OpSchema] = {
    op.name: op
    for op in (
        RMS_NORM,
        LINEAR,
        FP8_LINEAR,
        CACHED_ATTENTION,
        SILU_MUL,
        RESIDUAL_ADD,
        MOE_ROUTER,
        MOE_EXPERTS,
        FP8_MOE_EXPERTS,
        FP8_CACHE_WRITE,
        QKV_LINEAR,
        FP8_QKV_LINEAR,
        ATTENTION_BLOCK,
        FP8_ATTENTION_BLOCK,
        MOE_BLOCK,
        FP8_MOE_BLOCK,
        LOGITS,
        FP8_LOGITS,
    )
}

TENSORRT_PLUGINS = ("MoERouter", "MoEExperts", "FP8MoEExperts", "FP8CacheWrite")
"""The ops that TensorRT runs as our plugins; the others are function bodies in what its parser does best."""

FUSED = (
    *("QkvLinear", "FP8QkvLinear", "AttentionBlock", "FP8AttentionBlock"),
    *("MoEBlock", "FP8MoEBlock", "Logits", "FP8Logits"),
)
"""The ops that stand for several others, in graphs that fusion.py has prepared for the CPU kernels."""
