"""Matrix products of which TensorRT keeps the weights as narrow as they are stored.

A 16-bit product is written as one of float32 between Casts: TensorRT takes that as the order to multiply 16-bit factors
and sum in float32, which it does not promise otherwise. It takes it so only if the result is rounded to 16 bits at once
(else a float32 copy of the weight goes into the plan), so there is a second rounding where a bias is added.

FP8 needs none of that: the product of two DequantizeLinear to float32 is an FP8 GEMM with float32 results. The scale of
each row of x is multiplied back after it, since TensorRT takes no scale for activations that is computed in the graph.
"""

from __future__ import annotations

_LINEAR = """
Linear (x, weight, bias) => (y) {
  x_f32 = Cast <to: int = 1> (x)
  weight_f32 = Cast <to: int = 1> (weight)
  weight_IO = Transpose (weight_f32)
  product_f32 = MatMul (x_f32, weight_IO)
  RESULT
}
"""

LINEAR = _LINEAR.replace("RESULT", "y = CastLike (product_f32, x)")

LINEAR_BIAS = _LINEAR.replace(
    "RESULT",
    """product = CastLike (product_f32, x)
  rounded_f32 = Cast <to: int = 1> (product)
  y_f32 = Add (rounded_f32, bias)
  y = CastLike (y_f32, x)""",
)

# The head: x was widened from 16 bits, the logits are float32. Of the 16-bit products float16 keeps most of them; what
# is lost are 12 of float32's 24 bits (bfloat16, as transformers has it, would lose 15) and logits beyond 65504.
LINEAR_WIDENED = """
Linear (x, weight, bias) => (y) {
  x_f16 = Cast <to: int = 10> (x)
  x_f32 = Cast <to: int = 1> (x_f16)
  weight_f16 = Cast <to: int = 10> (weight)
  weight_f32 = Cast <to: int = 1> (weight_f16)
  weight_IO = Transpose (weight_f32)
  product_f32 = MatMul (x_f32, weight_IO)
  product_f16 = Cast <to: int = 10> (product_f32)
  y = Cast <to: int = 1> (product_f16)
}
"""

_FP8_LINEAR = """
FP8Linear (x, weight, weight_scale, bias) => (y) {
  x_f32 = Cast <to: int = 1> (x)
  rounded, scale = RoundRows (x_f32)
  weight_f32 = DequantizeLinear <axis: int = 0> (weight, weight_scale)
  weight_IO = Transpose (weight_f32)
  product_f32 = MatMul (rounded, weight_IO)
  scaled_f32 = Mul (product_f32, scale)
  RESULT
}
"""

FP8_LINEAR = _FP8_LINEAR.replace("RESULT", "y = CastLike (scaled_f32, x)")

FP8_LINEAR_BIAS = _FP8_LINEAR.replace(
    "RESULT",
    """y_f32 = Add (scaled_f32, bias)
  y = CastLike (y_f32, x)""",
)
