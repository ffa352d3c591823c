"""The function bodies of a target: the table op -> body, as ONNX functions ready to be put into a model."""

from __future__ import annotations

import re
from typing import Literal

import onnx
from onnx import parser

from glm_export.plugins.attention_block.portable import ATTENTION_BLOCK, FP8_ATTENTION_BLOCK
from glm_export.plugins.cached_attention import tensorrt as tensorrt_attention
from glm_export.plugins.cached_attention.portable import cached_attention
from glm_export.plugins.fp8_cache_write.portable import FP8_CACHE_WRITE
from glm_export.plugins.fp8_portable import FAKE_QUANTIZE_ROWS, ROUND_ROWS
from glm_export.plugins.linear import tensorrt as tensorrt_linear
from glm_export.plugins.linear.portable import FP8_LINEAR, LINEAR
from glm_export.plugins.logits.portable import FP8_LOGITS, LOGITS
from glm_export.plugins.moe_block.portable import FP8_MOE_BLOCK, MOE_BLOCK
from glm_export.plugins.moe_experts import tensorrt as tensorrt_experts
from glm_export.plugins.moe_experts.portable import FP8_MOE_EXPERTS, moe_experts
from glm_export.plugins.moe_router.portable import MOE_ROUTER
from glm_export.plugins.ops import OPS
from glm_export.plugins.qkv_linear.portable import FP8_QKV_LINEAR, QKV_LINEAR
from glm_export.plugins.residual_add.portable import RESIDUAL_ADD
from glm_export.plugins.rms_norm.portable import RMS_NORM
from glm_export.plugins.schema import DOMAIN, VERSION
from glm_export.plugins.silu_mul.portable import SILU_MUL

OPSET = 24
_TEXT_DTYPES = {"float32": "float", "bfloat16": "bfloat16", "float16": "float16"}

TENSORRT_DOMAIN = "trt"
"""Of TensorRT's own ops in its bodies. TensorRT ignores it; other tools want a domain of which they know no op."""

FUSED_BODIES = (
    *(QKV_LINEAR, FP8_QKV_LINEAR, ATTENTION_BLOCK, FP8_ATTENTION_BLOCK),
    *(MOE_BLOCK, FP8_MOE_BLOCK, LOGITS, FP8_LOGITS),
)

Experts = Literal["plugin", "trt_moe", "decomposed"]
"""What computes router and experts in TensorRT: plugins; the router a plugin and the experts TRT_MoE; standard ops."""


def portable_functions(*, compute_dtype: str, attentions: bool) -> tuple[onnx.FunctionProto, ...]:
    """All ops in standard ONNX, and the helper they share.

    Args:
        compute_dtype: float32, bfloat16 or float16: the dtype of unquantized expert weights.
        attentions: whether CachedAttention has its fourth output.
    """
    bodies = (
        FAKE_QUANTIZE_ROWS,  # first: the ONNX reference evaluator wants a function before those that call it
        RMS_NORM,
        LINEAR,
        FP8_LINEAR,
        cached_attention(attentions=attentions),
        SILU_MUL,
        RESIDUAL_ADD,
        MOE_ROUTER,
        moe_experts(_TEXT_DTYPES[compute_dtype]),
        FP8_MOE_EXPERTS,
        FP8_CACHE_WRITE,
        *FUSED_BODIES,
    )
    return tuple(_parse(body) for body in bodies)


def tensorrt_functions(
    *, compute_dtype: str, fp8_cache: bool, experts: Experts, decompose_attention: bool
) -> tuple[onnx.FunctionProto, ...]:
    """All ops that are no plugins, in what TensorRT's parser takes, and the helper they share.

    An op with several bodies has them as overloads: `Linear` and `FP8Linear` with "bias", `Linear` with "widened" for a
    float32 x and a narrower weight.

    Args:
        compute_dtype: float32, bfloat16 or float16.
        fp8_cache: whether the KV caches are E4M3; their writer is a plugin.
        experts: what computes router and experts.
        decompose_attention: whether attention may be computed without a fused kernel.
    """
    attention = tensorrt_attention.cached_attention(
        fp8_cache=fp8_cache,
        compute=onnx.TensorProto.DataType.Value(_TEXT_DTYPES[compute_dtype].upper()),
        decomposable=decompose_attention,
    )
    moe = {
        "plugin": (),
        "trt_moe": (tensorrt_experts.TRT_MOE_EXPERTS,),
        "decomposed": (MOE_ROUTER, tensorrt_experts.MOE_EXPERTS, tensorrt_experts.FP8_MOE_EXPERTS),
    }[experts]
    plain = (
        ROUND_ROWS,
        RMS_NORM,
        tensorrt_linear.LINEAR,
        tensorrt_linear.FP8_LINEAR,
        attention,
        SILU_MUL,
        RESIDUAL_ADD,
    )
    return (
        *(_parse(body) for body in (*plain, *moe)),
        _parse(tensorrt_linear.LINEAR_BIAS, overload="bias"),
        _parse(tensorrt_linear.LINEAR_WIDENED, overload="widened"),
        _parse(tensorrt_linear.FP8_LINEAR_BIAS, overload="bias"),
    )


def fused_functions() -> tuple[onnx.FunctionProto, ...]:
    """The ops that stand for several others, in terms of those."""
    return tuple(_parse(body) for body in FUSED_BODIES)


def _parse(body: str, overload: str = "") -> onnx.FunctionProto:
    # A call of another op or a shared helper needs its domain; the bodies read better without it.
    called = "|".join((*OPS, "FakeQuantizeRows", "RoundRows"))
    text = re.sub(rf"= ({called})\b", rf"= {DOMAIN}.\1", body)
    domains = {"": OPSET, DOMAIN: VERSION}
    if f"= {TENSORRT_DOMAIN}." in text:
        domains[TENSORRT_DOMAIN] = 1
    imports = ", ".join(f'"{domain}": {version}' for domain, version in domains.items())
    function = parser.parse_function(f'<domain: "{DOMAIN}", opset_import: [{imports}]>{text}')
    function.overload = overload
    if function.name in OPS:
        function.doc_string = OPS[function.name].doc
    return function
