"""The E4M3 weight goes through an Identity, for ONNX Runtime, as in qkv_linear/portable.py."""

_BODY = """
PREFIXAttentionBlock <rotary_dim, scale, epsilon>
    (q, k, v, cos, sin, k_cache, v_cache, write_index, length, INPUTS, o_bias, residual, norm_weight)
    => (sum, y, k_cache_out, v_cache_out) {
IDENTITY  out_BSHA, k_cache_out, v_cache_out = CachedAttention <rotary_dim: int = @rotary_dim, scale: float = @scale>
      (q, k, v, cos, sin, k_cache, v_cache, write_index, length)
  lead_shape = Shape <end: int = 2> (q)
  all_heads = Constant <value_ints: ints = [-1]> ()
  out_shape = Concat <axis: int = 0> (lead_shape, all_heads)
  out = Reshape (out_BSHA, out_shape)
  update = PREFIXLinear (out, WEIGHT, o_bias)
  sum = ResidualAdd (residual, update)
  y = RMSNorm <epsilon: float = @epsilon> (sum, norm_weight)
}
"""


def _body(prefix: str, inputs: str, identity: str, weight: str) -> str:
    text = _BODY.replace("PREFIX", prefix).replace("INPUTS", inputs)
    return text.replace("IDENTITY", identity).replace("WEIGHT", weight)


ATTENTION_BLOCK = _body("", "o_weight", "", "o_weight")
FP8_ATTENTION_BLOCK = _body("FP8", "o_weight, o_scale", "  o_e4m3 = Identity (o_weight)\n", "o_e4m3, o_scale")
