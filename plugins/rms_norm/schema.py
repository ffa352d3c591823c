from glm_export.plugins.schema import COMPUTE, FLOAT32, Attribute, OpSchema, Tensor

RMS_NORM = OpSchema(
    name="RMSNorm",
    torch_name="rms_norm",
    inputs=(
        Tensor(name="x", shape="...,D", dtypes=COMPUTE, meaning="activations"),
        Tensor(name="weight", shape="D", dtypes=FLOAT32, meaning="used as it is (no 1 + weight)"),
    ),
    outputs=(Tensor(name="y", shape="...,D", dtypes=COMPUTE, meaning="in the dtype of x"),),
    attributes=(Attribute(name="epsilon", type=float, meaning="added to the mean square"),),
    doc="y = x * rsqrt(mean(x^2) + epsilon) * weight, over the last axis.",
)
