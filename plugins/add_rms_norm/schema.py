from glm_export.plugins.residual_add.schema import RESIDUAL_ADD
from glm_export.plugins.rms_norm.schema import RMS_NORM
from glm_export.plugins.schema import COMPUTE, OpSchema, Tensor

ADD_RMS_NORM = OpSchema(
    name="AddRMSNorm",
    torch_name=None,
    inputs=(*RESIDUAL_ADD.inputs, RMS_NORM.inputs[1]),
    outputs=(
        Tensor(name="sum", shape="...,D", dtypes=COMPUTE, meaning="x + update, rounded once"),
        Tensor(name="y", shape="...,D", dtypes=COMPUTE, meaning="the rounded sum, normalized"),
    ),
    attributes=RMS_NORM.attributes,
    doc="sum = ResidualAdd(x, update), y = RMSNorm(sum).",
)
