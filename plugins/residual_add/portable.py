"""An op of its own because ONNX Runtime adds no bfloat16 on a CPU."""

RESIDUAL_ADD = """
ResidualAdd (x, update) => (y) {
  x_f32 = Cast <to: int = 1> (x)
  update_f32 = Cast <to: int = 1> (update)
  y_f32 = Add (x_f32, update_f32)
  y = CastLike (y_f32, x)
}
"""
