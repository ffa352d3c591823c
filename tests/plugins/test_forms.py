"""Every op has all its forms, and each says the same as the schema: names, order, dtypes, attributes."""

from __future__ import annotations

import inspect

import onnx
import pytest
import torch
import untraced
from onnx import defs
from torch import Tensor

from glm_export.plugins import torch_ops
from glm_export.plugins.bodies import OPSET, portable_functions
from glm_export.plugins.onnx_schema import onnx_schema
from glm_export.plugins.ops import FUSED, OPS
from glm_export.plugins.schema import DOMAIN, VERSION

# TensorRT chooses an importer by op_type and ignores the domain.
TENSORRT_NAMES = {
    *("Attention", "TRT_Attention", "TRT_QuantizedAttention", "TRT_KVCacheUpdate", "TRT_MoE", "QMoE", "MatMulNBits"),
    *("MultiHeadAttention", "GroupQueryAttention", "LinearAttention", "CausalConvWithState", "DistCollective"),
    *("SkipSimplifiedLayerNormalization", "SimplifiedLayerNormalization", "TensorScatter", "RotaryEmbedding"),
    *("TRT_FP8QuantizeLinear", "TRT_FP8DequantizeLinear", "TRT_INT4QuantizeLinear", "TRT_INT4DequantizeLinear"),
    *("TRT_MXFP8QuantizeLinear", "TRT_MXFP8DequantizeLinear", "TRT_MXFP8DynamicQuantize", "TRT_FP4DynamicQuantize"),
    *("TRT_DynamicQuantize", "TRT_BlockQuantize", "TRT_BlockDequantize", "ROIAlign_TRT"),
}
DTYPES = ("float32", "bfloat16", "float16")
every_op = pytest.mark.parametrize("name", OPS)
every_traced_op = pytest.mark.parametrize("name", [name for name, op in OPS.items() if op.torch_name])


def bodies(compute_dtype: str = "float32", *, attentions: bool = True) -> dict[str, onnx.FunctionProto]:
    return {f.name: f for f in portable_functions(compute_dtype=compute_dtype, attentions=attentions)}


def test_the_table_has_the_ops_of_the_design() -> None:
    assert list(OPS) == [
        *("RMSNorm", "Linear", "FP8Linear", "CachedAttention", "SiluMul", "ResidualAdd"),
        *("MoERouter", "MoEExperts", "FP8MoEExperts", "FP8CacheWrite", *FUSED),
    ]
    assert all(op.name == name for name, op in OPS.items())
    # The first takes the place of a part of CachedAttention where a target's caches are FP8, the others that of several
    # nodes.
    names = [name for name, op in OPS.items() if op.torch_name is None]
    assert names == ["FP8CacheWrite", *FUSED] == list(untraced.REFERENCES)


@every_traced_op
def test_torch_op_is_the_schema(name: str) -> None:
    op = OPS[name]
    signature = getattr(torch.ops.glm, op.torch_name).default._schema
    assert [a.name for a in signature.arguments] == [t.name for t in op.inputs] + [a.name for a in op.attributes]
    kinds = {int: "int", float: "float"}
    want = ["Optional[Tensor]" if t.optional else "Tensor" for t in op.inputs] + [kinds[a.type] for a in op.attributes]
    assert [str(a.type) for a in signature.arguments] == want
    assert [str(r.type) for r in signature.returns] == ["Tensor"] * len(op.outputs)
    assert not signature.is_mutable


@every_traced_op
def test_reference_is_the_schema(name: str) -> None:
    op = OPS[name]
    reference = inspect.unwrap(getattr(torch_ops, op.torch_name)._init_fn)
    assert reference.__module__ == f"glm_export.plugins.{_folder(name)}.reference"
    assert list(inspect.signature(reference).parameters) == [
        *(t.name for t in op.inputs),
        *(a.name for a in op.attributes),
    ]


@pytest.mark.parametrize("name", untraced.REFERENCES)
def test_reference_of_an_untraced_op_is_the_schema(name: str) -> None:
    op, reference = OPS[name], untraced.REFERENCES[name]
    assert list(inspect.signature(reference).parameters) == [
        *(t.name for t in op.inputs),
        *(a.name for a in op.attributes),
    ]


@every_traced_op
def test_translation_emits_the_node(name: str) -> None:
    op = OPS[name]
    assert getattr(torch.ops.glm, op.torch_name).default in torch_ops.TRANSLATIONS
    schema = onnx_schema(op)
    assert (schema.name, schema.domain, schema.since_version, schema.doc) == (name, DOMAIN, VERSION, op.doc)
    for ours, theirs in ((op.inputs, schema.inputs), (op.outputs, schema.outputs)):
        assert [t.name for t in ours] == [t.name for t in theirs]
        for tensor, parameter in zip(ours, theirs, strict=True):
            assert (parameter.option == defs.OpSchema.FormalParameterOption.Optional) == tensor.optional
            spelled = {"float32": "float", "float8_e4m3fn": "float8e4m3fn"}
            assert parameter.types == {f"tensor({spelled.get(dtype, dtype)})" for dtype in tensor.dtypes}
    assert sorted(schema.attributes) == sorted(a.name for a in op.attributes)
    for attribute in op.attributes:
        found = schema.attributes[attribute.name]
        assert found.required
        kinds = {int: defs.OpSchema.AttrType.INT, float: defs.OpSchema.AttrType.FLOAT}
        assert found.type == kinds[attribute.type]


def test_translations_are_of_these_ops_only() -> None:
    assert len(torch_ops.TRANSLATIONS) == sum(op.torch_name is not None for op in OPS.values())


@every_op
@pytest.mark.parametrize("compute_dtype", DTYPES)
@pytest.mark.parametrize("attentions", [False, True])
def test_portable_body_is_the_schema(name: str, compute_dtype: str, attentions: bool) -> None:
    op, body = OPS[name], bodies(compute_dtype, attentions=attentions)[name]
    assert (body.domain, body.doc_string) == (DOMAIN, op.doc)
    assert list(body.input) == [t.name for t in op.inputs]
    assert list(body.output) == [t.name for t in op.outputs if attentions or not t.optional]
    assert list(body.attribute) == [a.name for a in op.attributes]
    assert not body.attribute_proto
    assert {(i.domain, i.version) for i in body.opset_import} == {("", OPSET), (DOMAIN, VERSION)}


@pytest.mark.parametrize("compute_dtype", DTYPES)
def test_bodies_use_standard_ops_and_each_other(compute_dtype: str) -> None:
    found = bodies(compute_dtype)
    assert set(found) == {*OPS, "FakeQuantizeRows"}
    seen: set[str] = set()
    for name, body in found.items():
        for node in _nodes(body.node):
            if node.domain == DOMAIN:
                assert node.op_type in seen, f"{name} calls {node.op_type}, which comes later"
            else:
                assert defs.has(node.op_type, OPSET, ""), (name, node.op_type)
        seen.add(name)


@pytest.mark.parametrize("name", [*OPS, "FakeQuantizeRows"])
def test_name_is_free(name: str) -> None:
    # ONNX may take a name later than the opset we pin, as it took SwiGLU in 28: a node's domain keeps them apart,
    # except in TensorRT, which knows no opset above 24.
    assert name not in {schema.name for schema in defs.get_all_schemas_with_history() if schema.since_version <= OPSET}
    assert name not in TENSORRT_NAMES
    assert not name.startswith("TRT_")


def _arguments(name: str, dtype: torch.dtype) -> tuple[Tensor | float | None, ...]:
    def x(*shape: int) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype)

    def f32(*shape: int) -> Tensor:
        return x(*shape).float()

    def fp8(*shape: int) -> Tensor:
        return x(*shape).to(torch.float8_e4m3fn)

    ids = torch.tensor([[0, 3], [3, 1], [2, 0]], dtype=torch.int32)
    positions = (torch.tensor([0, 2]), torch.tensor([3, 5]))
    return {
        "RMSNorm": (x(2, 3, 8), f32(8), 1e-5),
        "Linear": (x(2, 3, 8), x(5, 8), f32(5)),
        "FP8Linear": (x(2, 3, 8), fp8(5, 8), f32(5).abs(), None),
        "CachedAttention": (
            *(x(2, 3, 4, 8), x(2, 3, 2, 8), x(2, 3, 2, 8), f32(2, 3, 2), f32(2, 3, 2), x(2, 2, 7, 8), x(2, 2, 7, 8)),
            *(*positions, 4, 0.35),
        ),
        "SiluMul": (x(2, 3, 8), x(2, 3, 8)),
        "ResidualAdd": (x(2, 3, 8), x(2, 3, 8)),
        "MoERouter": (f32(3, 8), f32(8), 2, 2, 1, 1, 2.5),
        "MoEExperts": (x(3, 8), ids, f32(3, 2), x(4, 12, 8), x(4, 8, 6)),
        "FP8MoEExperts": (x(3, 8), ids, f32(3, 2), fp8(4, 12, 8), f32(4, 12), fp8(4, 8, 6), f32(4, 8)),
    }[name]


@every_traced_op
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(name: str, dtype: torch.dtype) -> None:
    # The registration (no aliases, nothing mutated) and the fake kernel against the real one: shapes, dtypes, strides.
    op = getattr(torch.ops.glm, OPS[name].torch_name)
    # The first of them multiplies every argument, which torch does not do with FP8.
    tests = ("test_faketensor",) if name.startswith("FP8") else ("test_schema", "test_faketensor")
    result = torch.library.opcheck(op, _arguments(name, dtype), test_utils=tests)
    assert set(result.values()) == {"SUCCESS"}


@every_traced_op
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_torch_op_has_the_dtypes_of_the_schema(name: str, dtype: torch.dtype) -> None:
    op = OPS[name]
    found = getattr(torch.ops.glm, op.torch_name)(*_arguments(name, dtype))
    found = (found,) if isinstance(found, Tensor) else found
    assert len(found) == len(op.outputs)
    for tensor, schema in zip(found, op.outputs, strict=True):
        want = dtype if len(schema.dtypes) > 1 else getattr(torch, schema.dtypes[0])
        assert tensor.dtype == want, schema.name
        assert "..." in schema.shape or tensor.ndim == len(schema.shape.split(",")), schema.name


def _folder(name: str) -> str:
    return {
        **{"RMSNorm": "rms_norm", "Linear": "linear", "FP8Linear": "linear", "CachedAttention": "cached_attention"},
        **{
            "SiluMul": "silu_mul",
            "ResidualAdd": "residual_add",
            "MoERouter": "moe_router",
            "MoEExperts": "moe_experts",
            "FP8MoEExperts": "moe_experts",
        },
    }[name]


def _nodes(nodes: object) -> list[onnx.NodeProto]:
    """Nodes, those of their subgraphs included."""
    found: list[onnx.NodeProto] = []
    for node in nodes:  # type: ignore[attr-defined]
        found.append(node)
        for attribute in node.attribute:
            found += _nodes(attribute.g.node)
    return found
