from glm_export.plugins.schema import COMPUTE, FLOAT32, FP8, INT32, OpSchema, Tensor

_ROUTING = (
    Tensor(name="hidden", shape="T,D", dtypes=COMPUTE, meaning="tokens"),
    Tensor(name="expert_ids", shape="T,K", dtypes=INT32, meaning="from MoERouter"),
    Tensor(name="expert_weights", shape="T,K", dtypes=FLOAT32, meaning="from MoERouter"),
)
_OUT = Tensor(name="out", shape="T,D", dtypes=COMPUTE, meaning="weighted sum over the chosen experts, dtype of hidden")

MOE_EXPERTS = OpSchema(
    name="MoEExperts",
    torch_name="moe_experts",
    inputs=(
        *_ROUTING,
        Tensor(name="gate_up", shape="E,2F,D", dtypes=COMPUTE, meaning="gate rows first, then up rows"),
        Tensor(name="down", shape="E,D,F", dtypes=COMPUTE, meaning="one row per output"),
    ),
    outputs=(_OUT,),
    doc="out = sum over k of weight_k * down[e] @ round(silu(gate[e] @ x) * (up[e] @ x)); only chosen ones are read.",
)

FP8_MOE_EXPERTS = OpSchema(
    name="FP8MoEExperts",
    torch_name="fp8_moe_experts",
    inputs=(
        *_ROUTING,
        Tensor(name="gate_up", shape="E,2F,D", dtypes=FP8, meaning="E4M3, gate rows first, then up rows"),
        Tensor(name="gate_up_scale", shape="E,2F", dtypes=FLOAT32, meaning="scale of each row"),
        Tensor(name="down", shape="E,D,F", dtypes=FP8, meaning="E4M3, one row per output"),
        Tensor(name="down_scale", shape="E,D", dtypes=FLOAT32, meaning="scale of each row"),
    ),
    outputs=(_OUT,),
    doc="MoEExperts in W8A8: tokens are quantized per row once before dispatch, and once more before `down`.",
)
