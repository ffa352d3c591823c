"""The TensorRT bodies say the same as the schemas; what they compute is judged where the op is (evaluator tensorrt)."""

from __future__ import annotations

import onnx
import pytest
from onnx import defs

from glm_export.plugins.bodies import OPSET, TENSORRT_DOMAIN, Experts, tensorrt_functions
from glm_export.plugins.ops import FUSED, OPS, TENSORRT_PLUGINS
from glm_export.plugins.schema import DOMAIN

PLAIN = {"RMSNorm", "Linear", "FP8Linear", "CachedAttention", "SiluMul", "ResidualAdd"}
HELPER = "RoundRows"


def bodies(
    experts: Experts = "decomposed", *, compute_dtype: str = "bfloat16", fp8_cache: bool = False
) -> dict[tuple[str, str], onnx.FunctionProto]:
    functions = tensorrt_functions(
        compute_dtype=compute_dtype, fp8_cache=fp8_cache, experts=experts, decompose_attention=False
    )
    found = {(function.name, function.overload): function for function in functions}
    assert len(found) == len(functions)
    return found


@pytest.mark.parametrize(
    ("experts", "moe"),
    [
        ("plugin", set()),
        ("trt_moe", {"MoEExperts"}),
        ("decomposed", {"MoERouter", "MoEExperts", "FP8MoEExperts"}),
    ],
)
@pytest.mark.parametrize("fp8_cache", [False, True], ids=["", "fp8_cache"])
@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16", "float16"])
def test_every_op_is_a_body_or_a_plugin(experts: Experts, moe: set[str], fp8_cache: bool, compute_dtype: str) -> None:
    found = bodies(experts, compute_dtype=compute_dtype, fp8_cache=fp8_cache)
    names = {name for name, _ in found} - {HELPER}
    assert names == PLAIN | moe
    assert set(OPS) - names <= {*TENSORRT_PLUGINS, *FUSED}
    overloads = {("Linear", "bias"), ("Linear", "widened"), ("FP8Linear", "bias")}
    assert {key for key in found if key[1]} == overloads

    for (name, _), body in found.items():
        if name == HELPER:
            continue
        op = OPS[name]
        assert (body.domain, body.doc_string) == (DOMAIN, op.doc)
        assert list(body.input) == [t.name for t in op.inputs]
        assert list(body.output) == [t.name for t in op.outputs if not t.optional]
        assert list(body.attribute) == [a.name for a in op.attributes]
        for node in body.node:
            if node.domain == DOMAIN:
                assert node.op_type == HELPER or (fp8_cache and node.op_type == "FP8CacheWrite")
            elif node.domain == TENSORRT_DOMAIN:
                assert node.op_type in ("TRT_Attention", "TRT_MoE")
            else:
                assert defs.has(node.op_type, OPSET, ""), (name, node.op_type)


def test_the_two_cache_writers() -> None:
    def kinds(fp8_cache: bool) -> list[str]:
        return [node.op_type for node in bodies(fp8_cache=fp8_cache)["CachedAttention", ""].node]

    assert [kinds(False).count(kind) for kind in ("TensorScatter", "FP8CacheWrite")] == [2, 0]
    assert [kinds(True).count(kind) for kind in ("TensorScatter", "FP8CacheWrite", "DequantizeLinear")] == [0, 2, 2]
