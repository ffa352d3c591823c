"""Importing this defines all torch.ops.glm ops; TRANSLATIONS then says how each becomes an ONNX node."""

from glm_export.plugins.cached_attention.torch_op import cached_attention
from glm_export.plugins.linear.torch_op import fp8_linear, linear
from glm_export.plugins.moe_experts.torch_op import fp8_moe_experts, moe_experts
from glm_export.plugins.moe_router.torch_op import moe_router
from glm_export.plugins.residual_add.torch_op import residual_add
from glm_export.plugins.rms_norm.torch_op import rms_norm
from glm_export.plugins.silu_mul.torch_op import silu_mul
from glm_export.plugins.torch_library import TRANSLATIONS

__all__ = [
    "TRANSLATIONS",
    "cached_attention",
    "fp8_linear",
    "fp8_moe_experts",
    "linear",
    "moe_experts",
    "moe_router",
    "residual_add",
    "rms_norm",
    "silu_mul",
]
