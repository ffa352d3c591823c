"""What the portable body does, in what TensorRT turns into one fused attention kernel.

`TRT_Attention` reads each row's cache up to its kv length and no further, without a Slice. Its lower-right causal mask
is aligned to that length as Attention's is in the portable body: query i of S sees positions up to kv_length - S + i,
so kv_length = write_index + S. It does not scale: q is multiplied by `scale` before its one rounding. TensorScatter
becomes a KV-cache-update layer, which needs the caches to be inputs and outputs of the network.

An FP8 cache is written by a plugin (the layer takes no FP8), and attention reads it through a DequantizeLinear. That
costs time: TensorRT-RTX 1.7 dequantizes a layer's whole capacity in every step, in a kernel of its own. Only
`TRT_QuantizedAttention` reads E4M3 itself, but wants queries and probabilities in E4M3 too, which loses small ones.
"""

from __future__ import annotations

_BODY = """
CachedAttention <rotary_dim, scale> (q, k, v, cos, sin, k_cache, v_cache, write_index, length)
    => (out, k_cache_out, v_cache_out) {
  q_f32 = Cast <to: int = 1> (q)
  k_f32 = Cast <to: int = 1> (k)
  q_BHSA = Transpose <perm: ints = [0, 2, 1, 3]> (q_f32)
  k_BJSA = Transpose <perm: ints = [0, 2, 1, 3]> (k_f32)
  v_BJSA = Transpose <perm: ints = [0, 2, 1, 3]> (v)
  q_rotated_f32 = RotaryEmbedding <rotary_embedding_dim: int = @rotary_dim> (q_BHSA, cos, sin)
  k_rotated_f32 = RotaryEmbedding <rotary_embedding_dim: int = @rotary_dim> (k_BJSA, cos, sin)
  scale = Constant <value_float: float = @scale> ()
  q_scaled_f32 = Mul (q_rotated_f32, scale)
  q_scaled = CastLike (q_scaled_f32, q)
  k_rotated = CastLike (k_rotated_f32, k)
  WRITE
  new_tokens = Shape <start: int = 1, end: int = 2> (q)
  end_B = Add (write_index, new_tokens)
  kv_length_B = Cast <to: int = 6> (end_B)
  out_BHSA = trt.TRT_Attention <causal_kind: string = "lower_right", TRT_decomposable: int = DECOMPOSABLE>
      (q_scaled, KEYS, VALUES, , , kv_length_B)
  out = Transpose <perm: ints = [0, 2, 1, 3]> (out_BHSA)
}
"""

_WRITE = """
  k_cache_out = TensorScatter <axis: int = -2> (k_cache, k_rotated, write_index)
  v_cache_out = TensorScatter <axis: int = -2> (v_cache, v_BJSA, write_index)
"""

_WRITE_FP8 = """
  write_index_i32 = Cast <to: int = 6> (write_index)
  k_cache_out = glm.FP8CacheWrite (k_cache, k_rotated, write_index_i32)
  v_cache_out = glm.FP8CacheWrite (v_cache, v_BJSA, write_index_i32)
  unit = Constant <value_float: float = 1.0> ()
  keys = DequantizeLinear <output_dtype: int = COMPUTE> (k_cache_out, unit)
  values = DequantizeLinear <output_dtype: int = COMPUTE> (v_cache_out, unit)
"""


def cached_attention(*, fp8_cache: bool, compute: int, decomposable: bool) -> str:
    """The body.

    Args:
        fp8_cache: whether the caches are E4M3.
        compute: ONNX number of the compute dtype.
        decomposable: whether TensorRT may fall back to plain matrix products where it has no fused kernel: float32, and
            in TensorRT-RTX capacities above 28544.
    """
    write, keys, values = (_WRITE_FP8, "keys", "values") if fp8_cache else (_WRITE, "k_cache_out", "v_cache_out")
    text = _BODY.replace("WRITE", write.strip().replace("COMPUTE", str(compute)))
    return text.replace("KEYS", keys).replace("VALUES", values).replace("DECOMPOSABLE", str(int(decomposable)))
