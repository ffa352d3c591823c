from glm_export.plugins.schema import COMPUTE, FLOAT32, FP8, OpSchema, Tensor

_X = Tensor(name="x", shape="B,1,D", dtypes=COMPUTE, meaning="activations of each row's last token, normed")
_LOGITS = (Tensor(name="logits", shape="B,V", dtypes=FLOAT32, meaning="not rounded"),)

LOGITS = OpSchema(
    name="Logits",
    torch_name=None,
    inputs=(_X, Tensor(name="weight", shape="V,D", dtypes=COMPUTE, meaning="one row per token id")),
    outputs=_LOGITS,
    doc="logits = Linear(x as float32), without the axis of the one token.",
)

FP8_LOGITS = OpSchema(
    name="FP8Logits",
    torch_name=None,
    inputs=(
        _X,
        Tensor(name="weight", shape="V,D", dtypes=FP8, meaning="one row per token id"),
        Tensor(name="weight_scale", shape="V", dtypes=FLOAT32, meaning="scale of each row"),
    ),
    outputs=_LOGITS,
    doc="Logits with FP8Linear.",
)
