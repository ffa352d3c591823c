from glm_export.plugins.schema import COMPUTE, FLOAT32, INT64, Attribute, OpSchema, Tensor

CACHED_ATTENTION = OpSchema(
    name="CachedAttention",
    torch_name="cached_attention",
    inputs=(
        Tensor(name="q", shape="B,S,H,A", dtypes=COMPUTE, meaning="queries, not rotated"),
        Tensor(name="k", shape="B,S,J,A", dtypes=COMPUTE, meaning="keys, not rotated"),
        Tensor(name="v", shape="B,S,J,A", dtypes=COMPUTE, meaning="values"),
        Tensor(name="cos", shape="B,S,R", dtypes=FLOAT32, meaning="of each new token's angles, R = rotary_dim / 2"),
        Tensor(name="sin", shape="B,S,R", dtypes=FLOAT32, meaning="likewise"),
        Tensor(name="k_cache", shape="B,J,C,A", dtypes=COMPUTE, meaning="rotated keys; a dtype of its own"),
        Tensor(name="v_cache", shape="B,J,C,A", dtypes=COMPUTE, meaning="values; dtype of k_cache"),
        Tensor(name="write_index", shape="B", dtypes=INT64, meaning="tokens already in the cache"),
        Tensor(name="length", shape="B", dtypes=INT64, meaning="valid tokens after this step; later ones are padding"),
    ),
    outputs=(
        Tensor(name="out", shape="B,S,H,A", dtypes=COMPUTE, meaning="dtype of q; unspecified for padding tokens"),
        Tensor(
            name="k_cache_out",
            shape="B,J,C,A",
            dtypes=COMPUTE,
            meaning="k_cache, updated in place",
            in_place_of="k_cache",
        ),
        Tensor(
            name="v_cache_out",
            shape="B,J,C,A",
            dtypes=COMPUTE,
            meaning="v_cache, updated in place",
            in_place_of="v_cache",
        ),
        Tensor(
            name="attentions",
            shape="B,H,S,C",
            dtypes=FLOAT32,
            meaning="probabilities, zero beyond the attended positions",
            optional=True,
        ),
    ),
    attributes=(
        Attribute(name="rotary_dim", type=int, meaning="leading elements of a head that are rotated, half split"),
        Attribute(name="scale", type=float, meaning="multiplies the scores"),
    ),
    doc="Rotates q and k, writes k and v at write_index.., rounded to the dtype of the caches, and attends causally: "
    "token i sees positions 0..write_index+i.",
)
