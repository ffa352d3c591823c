from glm_export.plugins.schema import FLOAT32, INT32, Attribute, OpSchema, Tensor

MOE_ROUTER = OpSchema(
    name="MoERouter",
    torch_name="moe_router",
    inputs=(
        Tensor(name="logits", shape="T,E", dtypes=FLOAT32, meaning="router logits"),
        Tensor(name="correction_bias", shape="E", dtypes=FLOAT32, meaning="e_score_correction_bias: for choosing only"),
    ),
    outputs=(
        Tensor(name="expert_ids", shape="T,K", dtypes=INT32, meaning="chosen experts, best first"),
        Tensor(name="expert_weights", shape="T,K", dtypes=FLOAT32, meaning="their weights"),
    ),
    attributes=(
        Attribute(name="top_k", type=int, meaning="experts per token", letter="K"),
        Attribute(name="n_group", type=int, meaning="expert groups, G"),
        Attribute(name="topk_group", type=int, meaning="groups a token may use"),
        Attribute(name="norm_topk_prob", type=int, meaning="1: weights are divided by their sum + 1e-20"),
        Attribute(name="routed_scaling_factor", type=float, meaning="multiplies the weights, after normalization"),
    ),
    doc="Sigmoid router with correction bias and group-limited top-k. Ties go to the lowest expert id.",
)
