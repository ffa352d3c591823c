from glm_export.plugins.schema import COMPUTE, OpSchema, Tensor

RESIDUAL_ADD = OpSchema(
    name="ResidualAdd",
    torch_name="residual_add",
    inputs=(
        Tensor(name="x", shape="...,D", dtypes=COMPUTE, meaning="the residual stream"),
        Tensor(name="update", shape="...,D", dtypes=COMPUTE, meaning="what a block adds to it"),
    ),
    outputs=(Tensor(name="y", shape="...,D", dtypes=COMPUTE, meaning="in the dtype of x"),),
    doc="y = x + update, rounded once.",
)
