from glm_export.plugins.attention_block.schema import RESIDUAL, SUM_AND_NORM
from glm_export.plugins.moe_experts.schema import FP8_MOE_EXPERTS, MOE_EXPERTS
from glm_export.plugins.moe_router.schema import MOE_ROUTER
from glm_export.plugins.rms_norm.schema import RMS_NORM
from glm_export.plugins.schema import COMPUTE, FLOAT32, FP8, OpSchema, Tensor

_ROUTING = (
    Tensor(name="x", shape="B,S,D", dtypes=COMPUTE, meaning="activations, normed"),
    Tensor(name="router_weight", shape="E,D", dtypes=FLOAT32, meaning="one row per expert"),
    MOE_ROUTER.inputs[1],
)


def _shared(name: str, rows: str, columns: str, dtypes: tuple[str, ...]) -> tuple[Tensor, ...]:
    """A weight of the shared expert, N wide, without bias, as Linear or FP8Linear has it."""
    scale = Tensor(name=f"{name}_scale", shape=rows, dtypes=FLOAT32, meaning="scale of each row")
    return (
        Tensor(name=name, shape=f"{rows},{columns}", dtypes=dtypes, meaning="shared expert: one row per output"),
        *([scale] if dtypes == FP8 else []),
    )


def _inputs(experts: OpSchema, dtypes: tuple[str, ...]) -> tuple[Tensor, ...]:
    return (
        *_ROUTING,
        *experts.inputs[3:],
        *_shared("shared_gate", "N", "D", dtypes),
        *_shared("shared_up", "N", "D", dtypes),
        *_shared("shared_down", "D", "N", dtypes),
        *RESIDUAL,
    )


MOE_BLOCK = OpSchema(
    name="MoEBlock",
    torch_name=None,
    inputs=_inputs(MOE_EXPERTS, COMPUTE),
    outputs=SUM_AND_NORM,
    attributes=(*MOE_ROUTER.attributes, *RMS_NORM.attributes),
    doc="sum = residual + (MoEExperts(x, MoERouter(Linear(x as float32))) + the shared expert's Linear(SiluMul(Linear, "
    "Linear))), y = RMSNorm(sum).",
)

FP8_MOE_BLOCK = OpSchema(
    name="FP8MoEBlock",
    torch_name=None,
    inputs=_inputs(FP8_MOE_EXPERTS, FP8),
    outputs=SUM_AND_NORM,
    attributes=(*MOE_ROUTER.attributes, *RMS_NORM.attributes),
    doc="MoEBlock with FP8MoEExperts and FP8Linear; the router stays float32.",
)
