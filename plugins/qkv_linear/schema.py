from glm_export.plugins.schema import COMPUTE, FLOAT32, FP8, Attribute, OpSchema, Tensor

_X = Tensor(name="x", shape="B,S,D", dtypes=COMPUTE, meaning="activations")
_HEAD_SIZE = Attribute(name="head_size", type=int, meaning="what the outputs are cut into", letter="A")
_OUTPUTS = (
    Tensor(name="q", shape="B,S,H,A", dtypes=COMPUTE, meaning="in the dtype of x"),
    Tensor(name="k", shape="B,S,J,A", dtypes=COMPUTE, meaning="in the dtype of x"),
    Tensor(name="v", shape="B,S,J,A", dtypes=COMPUTE, meaning="in the dtype of x"),
)


def _projection(name: str, heads: str, dtypes: tuple[str, ...]) -> tuple[Tensor, ...]:
    """The inputs for one output, as Linear or FP8Linear has them."""
    rows = f"{heads}*A"
    scale = Tensor(name=f"{name}_scale", shape=rows, dtypes=FLOAT32, meaning="scale of each row")
    return (
        Tensor(name=f"{name}_weight", shape=f"{rows},D", dtypes=dtypes, meaning="one row per output"),
        *([scale] if dtypes == FP8 else []),
        Tensor(name=f"{name}_bias", shape=rows, dtypes=FLOAT32, meaning="added before the one rounding", optional=True),
    )


def _inputs(dtypes: tuple[str, ...]) -> tuple[Tensor, ...]:
    return (_X, *_projection("q", "H", dtypes), *_projection("k", "J", dtypes), *_projection("v", "J", dtypes))


QKV_LINEAR = OpSchema(
    name="QkvLinear",
    torch_name=None,
    inputs=_inputs(COMPUTE),
    outputs=_OUTPUTS,
    attributes=(_HEAD_SIZE,),
    doc="Three Linear of one x, their outputs cut into heads.",
)

FP8_QKV_LINEAR = OpSchema(
    name="FP8QkvLinear",
    torch_name=None,
    inputs=_inputs(FP8),
    outputs=_OUTPUTS,
    attributes=(_HEAD_SIZE,),
    doc="Three FP8Linear of one x, their outputs cut into heads.",
)
