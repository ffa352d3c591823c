"""Both bodies flatten x to rows and use Gemm, which takes a transposed weight and an absent bias as they are."""

LINEAR = """
Linear (x, weight, bias) => (y) {
  x_f32 = Cast <to: int = 1> (x)
  x_TI = Flatten <axis: int = -1> (x_f32)
  weight_f32 = Cast <to: int = 1> (weight)
  y_TO = Gemm <transB: int = 1> (x_TI, weight_f32, bias)
  lead_shape = Shape <end: int = -1> (x)
  out_size = Shape <end: int = 1> (weight)
  y_shape = Concat <axis: int = 0> (lead_shape, out_size)
  y_f32 = Reshape (y_TO, y_shape)
  y = CastLike (y_f32, x)
}
"""

FP8_LINEAR = """
FP8Linear (x, weight, weight_scale, bias) => (y) {
  x_f32 = Cast <to: int = 1> (x)
  x_TI = Flatten <axis: int = -1> (x_f32)
  x_hat_TI = FakeQuantizeRows (x_TI)
  weight_f32 = DequantizeLinear <axis: int = 0> (weight, weight_scale)
  y_TO = Gemm <transB: int = 1> (x_hat_TI, weight_f32, bias)
  lead_shape = Shape <end: int = -1> (x)
  out_size = Shape <end: int = 1> (weight)
  y_shape = Concat <axis: int = 0> (lead_shape, out_size)
  y_f32 = Reshape (y_TO, y_shape)
  y = CastLike (y_f32, x)
}
"""
