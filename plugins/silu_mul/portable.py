SILU_MUL = """
SiluMul (gate, up) => (y) {
  gate_f32 = Cast <to: int = 1> (gate)
  up_f32 = Cast <to: int = 1> (up)
  sigmoid = Sigmoid (gate_f32)
  silu = Mul (gate_f32, sigmoid)
  y_f32 = Mul (silu, up_f32)
  y = CastLike (y_f32, gate)
}
"""
