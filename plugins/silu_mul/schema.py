from glm_export.plugins.schema import COMPUTE, OpSchema, Tensor

SILU_MUL = OpSchema(
    name="SiluMul",
    torch_name="silu_mul",
    inputs=(
        Tensor(name="gate", shape="...,F", dtypes=COMPUTE, meaning="goes through SiLU"),
        Tensor(name="up", shape="...,F", dtypes=COMPUTE, meaning="multiplied"),
    ),
    outputs=(Tensor(name="y", shape="...,F", dtypes=COMPUTE, meaning="in the dtype of gate"),),
    doc="y = silu(gate) * up.",
)
