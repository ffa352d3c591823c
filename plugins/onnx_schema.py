"""An op's schema in ONNX's own form, for emitting nodes that are checked as standard ones are."""

from __future__ import annotations

from onnx.defs import OpSchema as OnnxSchema

from glm_export.plugins.schema import DOMAIN, VERSION, OpSchema, Tensor

_TYPES = {
    "float32": "tensor(float)",
    "bfloat16": "tensor(bfloat16)",
    "float16": "tensor(float16)",
    "float8_e4m3fn": "tensor(float8e4m3fn)",
    "int32": "tensor(int32)",
    "int64": "tensor(int64)",
}


def onnx_schema(op: OpSchema) -> OnnxSchema:
    """The ONNX OpSchema of an op; every input and output has a type constraint of its own."""
    option = OnnxSchema.FormalParameterOption

    def parameter(tensor: Tensor) -> OnnxSchema.FormalParameter:
        return OnnxSchema.FormalParameter(
            tensor.name,
            f"T_{tensor.name}",
            f"[{tensor.shape}] {tensor.meaning}",
            param_option=option.Optional if tensor.optional else option.Single,
        )

    kinds = {int: OnnxSchema.AttrType.INT, float: OnnxSchema.AttrType.FLOAT}
    return OnnxSchema(
        op.name,
        DOMAIN,
        VERSION,
        op.doc,
        inputs=[parameter(t) for t in op.inputs],
        outputs=[parameter(t) for t in op.outputs],
        type_constraints=[
            (f"T_{t.name}", [_TYPES[dtype] for dtype in t.dtypes], t.meaning) for t in (*op.inputs, *op.outputs)
        ],
        attributes=[OnnxSchema.Attribute(a.name, kinds[a.type], a.meaning, required=True) for a in op.attributes],
    )
