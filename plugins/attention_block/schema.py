from glm_export.plugins.cached_attention.schema import CACHED_ATTENTION
from glm_export.plugins.rms_norm.schema import RMS_NORM
from glm_export.plugins.schema import COMPUTE, FLOAT32, FP8, OpSchema, Tensor

RESIDUAL = (
    Tensor(name="residual", shape="B,S,D", dtypes=COMPUTE, meaning="what the block's result is added to"),
    Tensor(name="norm_weight", shape="D", dtypes=FLOAT32, meaning="of the norm after the sum"),
)
"""The last inputs of a block that ends with a sum and a norm."""

SUM_AND_NORM = (
    Tensor(name="sum", shape="B,S,D", dtypes=COMPUTE, meaning="residual + the block's result, rounded once"),
    Tensor(name="y", shape="B,S,D", dtypes=COMPUTE, meaning="the rounded sum, normalized"),
)
"""Its first outputs."""


def _inputs(dtypes: tuple[str, ...]) -> tuple[Tensor, ...]:
    scale = Tensor(name="o_scale", shape="D", dtypes=FLOAT32, meaning="scale of each row")
    return (
        *CACHED_ATTENTION.inputs,
        Tensor(name="o_weight", shape="D,H*A", dtypes=dtypes, meaning="output projection: one row per output"),
        *([scale] if dtypes == FP8 else []),
        Tensor(name="o_bias", shape="D", dtypes=FLOAT32, meaning="added before the one rounding", optional=True),
        *RESIDUAL,
    )


ATTENTION_BLOCK = OpSchema(
    name="AttentionBlock",
    torch_name=None,
    inputs=_inputs(COMPUTE),
    outputs=(*SUM_AND_NORM, *CACHED_ATTENTION.outputs[1:3]),
    attributes=(*CACHED_ATTENTION.attributes, *RMS_NORM.attributes),
    doc="sum = ResidualAdd(residual, Linear(CachedAttention)), y = RMSNorm(sum).",
)

FP8_ATTENTION_BLOCK = OpSchema(
    name="FP8AttentionBlock",
    torch_name=None,
    inputs=_inputs(FP8),
    outputs=ATTENTION_BLOCK.outputs,
    attributes=ATTENTION_BLOCK.attributes,
    doc="AttentionBlock with FP8Linear.",
)
