"""Every E4M3 weight goes through an Identity.

ONNX Runtime tells the types that an input may have from the standard ops that read it, and without one it takes no FP8.
"""

_HEADS_SHAPE = """
  lead_shape = Shape <end: int = -1> (x)
  all_heads = Constant <value_ints: ints = [-1]> ()
  head_size_0 = Constant <value_int: int = @head_size> ()
  axis_0 = Constant <value_ints: ints = [0]> ()
  head_size_1 = Unsqueeze (head_size_0, axis_0)
  heads_shape = Concat <axis: int = 0> (lead_shape, all_heads, head_size_1)
"""

QKV_LINEAR = f"""
QkvLinear <head_size> (x, q_weight, q_bias, k_weight, k_bias, v_weight, v_bias) => (q, k, v) {{{_HEADS_SHAPE}
  q_BSO = Linear (x, q_weight, q_bias)
  q = Reshape (q_BSO, heads_shape)
  k_BSO = Linear (x, k_weight, k_bias)
  k = Reshape (k_BSO, heads_shape)
  v_BSO = Linear (x, v_weight, v_bias)
  v = Reshape (v_BSO, heads_shape)
}}
"""

FP8_QKV_LINEAR = f"""
FP8QkvLinear <head_size>
    (x, q_weight, q_scale, q_bias, k_weight, k_scale, k_bias, v_weight, v_scale, v_bias) => (q, k, v) {{{_HEADS_SHAPE}
  q_e4m3 = Identity (q_weight)
  q_BSO = FP8Linear (x, q_e4m3, q_scale, q_bias)
  q = Reshape (q_BSO, heads_shape)
  k_e4m3 = Identity (k_weight)
  k_BSO = FP8Linear (x, k_e4m3, k_scale, k_bias)
  k = Reshape (k_BSO, heads_shape)
  v_e4m3 = Identity (v_weight)
  v_BSO = FP8Linear (x, v_e4m3, v_scale, v_bias)
  v = Reshape (v_BSO, heads_shape)
}}
"""
