RMS_NORM = """
RMSNorm <epsilon> (x, weight) => (y) {
  x_f32 = Cast <to: int = 1> (x)
  y_f32 = RMSNormalization <axis: int = -1, epsilon: float = @epsilon> (x_f32, weight)
  y = CastLike (y_f32, x)
}
"""
