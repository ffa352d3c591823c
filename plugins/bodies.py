"""The function bodies of a target: the table op -> body, as ONNX functions ready to be put into a model."""

from __future__ import annotations

import onnx
from onnx import parser

from glm_export.plugins.cached_attention.portable import cached_attention
from glm_export.plugins.fp8_portable import FAKE_QUANTIZE_ROWS
from glm_export.plugins.linear.portable import FP8_LINEAR, LINEAR
from glm_export.plugins.moe_experts.portable import FP8_MOE_EXPERTS, moe_experts
from glm_export.plugins.moe_router.portable import MOE_ROUTER
from glm_export.plugins.ops import OPS
from glm_export.plugins.residual_add.portable import RESIDUAL_ADD
from glm_export.plugins.rms_norm.portable import RMS_NORM
from glm_export.plugins.schema import DOMAIN, VERSION
from glm_export.plugins.silu_mul.portable import SILU_MUL

OPSET = 24
_TEXT_DTYPES = {"float32": "float", "bfloat16": "bfloat16", "float16": "float16"}


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
    )
    return tuple(_parse(body) for body in bodies)


def _parse(body: str) -> onnx.FunctionProto:
    # A call of the shared helper needs its domain; the bodies read better without it.
    text = body.replace("= FakeQuantizeRows", f"= {DOMAIN}.FakeQuantizeRows")
    function = parser.parse_function(f'<domain: "{DOMAIN}", opset_import: ["": {OPSET}, "{DOMAIN}": {VERSION}]>{text}')
    if function.name in OPS:
        function.doc_string = OPS[function.name].doc
    return function
