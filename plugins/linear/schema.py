from glm_export.plugins.schema import COMPUTE, FLOAT32, FP8, OpSchema, Tensor

_X = Tensor(name="x", shape="...,I", dtypes=COMPUTE, meaning="activations")
_BIAS = Tensor(name="bias", shape="O", dtypes=FLOAT32, meaning="added before the one rounding", optional=True)
_Y = Tensor(name="y", shape="...,O", dtypes=COMPUTE, meaning="x @ weight^T + bias in the dtype of x")

LINEAR = OpSchema(
    name="Linear",
    torch_name="linear",
    inputs=(_X, Tensor(name="weight", shape="O,I", dtypes=COMPUTE, meaning="one row per output"), _BIAS),
    outputs=(_Y,),
    doc="y = x @ weight^T + bias. The weight's dtype may differ from that of x (bf16 head, float32 logits).",
)

# A function body can not ask whether an optional input is there, hence a second op and not an optional scale.
FP8_LINEAR = OpSchema(
    name="FP8Linear",
    torch_name="fp8_linear",
    inputs=(
        _X,
        Tensor(name="weight", shape="O,I", dtypes=FP8, meaning="E4M3, one row per output"),
        Tensor(name="weight_scale", shape="O", dtypes=FLOAT32, meaning="scale of each row"),
        _BIAS,
    ),
    outputs=(_Y,),
    doc="W8A8: x is quantized per row to E4M3 (scale amax/448), y = (x_q @ weight^T) * x_scale * weight_scale + bias.",
)
