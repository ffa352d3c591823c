"""TensorScatter writes the cache in place where the runtime binds input and output to one buffer.

Attention then reads the cache only up to the longest row: the Slice keeps the cost of a step near the tokens in use,
whatever the capacity. `nonpad_kv_seqlen` is write_index + S, because Attention's causal mask is aligned to its end:
query i of S sees positions up to nonpad_kv_seqlen - S + i = write_index + i. Pad is told its zero, because the ONNX
reference evaluator takes an omitted input for one of the outputs omitted above it.
"""

_BODY = """
CachedAttention <rotary_dim, scale> (q, k, v, cos, sin, k_cache, v_cache, write_index, length) => OUTPUTS {
  q_f32 = Cast <to: int = 1> (q)
  k_f32 = Cast <to: int = 1> (k)
  q_BHSA = Transpose <perm: ints = [0, 2, 1, 3]> (q_f32)
  k_BJSA = Transpose <perm: ints = [0, 2, 1, 3]> (k_f32)
  v_BJSA = Transpose <perm: ints = [0, 2, 1, 3]> (v)
  q_rotated_f32 = RotaryEmbedding <rotary_embedding_dim: int = @rotary_dim> (q_BHSA, cos, sin)
  k_rotated_f32 = RotaryEmbedding <rotary_embedding_dim: int = @rotary_dim> (k_BJSA, cos, sin)
  q_rotated = CastLike (q_rotated_f32, q)
  k_rotated = CastLike (k_rotated_f32, k_cache)
  v_rounded = CastLike (v_BJSA, v_cache)
  k_cache_out = TensorScatter <axis: int = -2> (k_cache, k_rotated, write_index)
  v_cache_out = TensorScatter <axis: int = -2> (v_cache, v_rounded, write_index)

  new_tokens = Shape <start: int = 1, end: int = 2> (q)
  end_B = Add (write_index, new_tokens)
  longest = ReduceMax <keepdims: int = 1> (end_B)
  start = Constant <value_ints: ints = [0]> ()
  axis = Constant <value_ints: ints = [2]> ()
  k_used = Slice (k_cache_out, start, longest, axis)
  v_used = Slice (v_cache_out, start, longest, axis)
  q_used_f32 = Cast <to: int = 1> (q_rotated)
  k_used_f32 = Cast <to: int = 1> (k_used)
  v_used_f32 = Cast <to: int = 1> (v_used)
  ATTENTION
  out_BSHA = Transpose <perm: ints = [0, 2, 1, 3]> (out_BHSA)
  out = CastLike (out_BSHA, q)
}
"""

_ATTENTION = """
  out_BHSA = Attention <is_causal: int = 1, scale: float = @scale>
      (q_used_f32, k_used_f32, v_used_f32, , , , end_B)
"""

_ATTENTION_WITH_PROBABILITIES = """
  out_BHSA, , , probs_BHSP = Attention <is_causal: int = 1, scale: float = @scale, qk_matmul_output_mode: int = 3>
      (q_used_f32, k_used_f32, v_used_f32, , , , end_B)
  capacity = Shape <start: int = 2, end: int = 3> (k_cache)
  unused = Sub (capacity, longest)
  last_axis = Constant <value_ints: ints = [3]> ()
  pads = Concat <axis: int = 0> (start, unused)
  zero = Constant <value_float: float = 0.0> ()
  attentions = Pad (probs_BHSP, pads, zero, last_axis)
"""


def cached_attention(*, attentions: bool) -> str:
    """The body; with `attentions` it has the optional fourth output."""
    outputs = "(out, k_cache_out, v_cache_out, attentions)" if attentions else "(out, k_cache_out, v_cache_out)"
    attention = _ATTENTION_WITH_PROBABILITIES if attentions else _ATTENTION
    return _BODY.replace("OUTPUTS", outputs).replace("ATTENTION", attention.strip())
