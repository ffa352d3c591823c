"""The E4M3 weight goes through an Identity, for ONNX Runtime, as in qkv_linear/portable.py."""

LOGITS = """
Logits (x, weight) => (logits) {
  x_f32 = Cast <to: int = 1> (x)
  logits_B1V = Linear (x_f32, weight, "")
  axis_1 = Constant <value_ints: ints = [1]> ()
  logits = Squeeze (logits_B1V, axis_1)
}
"""

FP8_LOGITS = """
FP8Logits (x, weight, weight_scale) => (logits) {
  x_f32 = Cast <to: int = 1> (x)
  weight_e4m3 = Identity (weight)
  logits_B1V = FP8Linear (x_f32, weight_e4m3, weight_scale, "")
  axis_1 = Constant <value_ints: ints = [1]> ()
  logits = Squeeze (logits_B1V, axis_1)
}
"""
