from glm_export.plugins.schema import COMPUTE, FP8, INT32, OpSchema, Tensor

FP8_CACHE_WRITE = OpSchema(
    name="FP8CacheWrite",
    torch_name=None,
    inputs=(
        Tensor(name="cache", shape="B,J,C,A", dtypes=FP8, meaning="keys or values of the tokens so far, E4M3"),
        Tensor(name="update", shape="B,J,S,A", dtypes=COMPUTE, meaning="those of the new tokens"),
        Tensor(name="write_index", shape="B", dtypes=INT32, meaning="tokens already in the cache"),
    ),
    outputs=(
        Tensor(name="cache_out", shape="B,J,C,A", dtypes=FP8, meaning="cache, updated in place", in_place_of="cache"),
    ),
    doc="Writes update, saturated and rounded to E4M3 with scale 1, at write_index..; positions beyond C are left out.",
)
