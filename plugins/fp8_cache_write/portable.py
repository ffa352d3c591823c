"""Every position of the cache takes a new token's row or keeps its own; standard scatters take no FP8."""

FP8_CACHE_WRITE = """
FP8CacheWrite (cache, update, write_index) => (cache_out) {
  axis_0 = Constant <value_ints: ints = [0]> ()
  last = Constant <value_ints: ints = [-1]> ()
  zero = Constant <value_int: int = 0> ()
  one = Constant <value_int: int = 1> ()
  capacity_1 = Shape <start: int = 2, end: int = 3> (cache)
  capacity = Squeeze (capacity_1, axis_0)
  new_tokens_1 = Shape <start: int = 2, end: int = 3> (update)
  new_tokens = Squeeze (new_tokens_1, axis_0)
  newest = Sub (new_tokens, one)

  position_C = Range (zero, capacity, one)
  write_index_i64 = Cast <to: int = 7> (write_index)
  write_index_B1 = Unsqueeze (write_index_i64, last)
  token_BC = Sub (position_C, write_index_B1)
  token_clipped_BC = Clip (token_BC, zero, newest)
  is_new_BC = Equal (token_BC, token_clipped_BC)
  axes_1_3 = Constant <value_ints: ints = [1, 3]> ()
  token_B1C1 = Unsqueeze (token_clipped_BC, axes_1_3)
  is_new_B1C1 = Unsqueeze (is_new_BC, axes_1_3)

  unit = Constant <value_float: float = 1.0> ()
  old_BJCA = DequantizeLinear (cache, unit)
  update_f32 = Cast <to: int = 1> (update)
  shape_BJCA = Shape (cache)
  token_BJCA = Expand (token_B1C1, shape_BJCA)
  new_BJCA = GatherElements <axis: int = 2> (update_f32, token_BJCA)
  all_BJCA = Where (is_new_B1C1, new_BJCA, old_BJCA)
  cache_out = QuantizeLinear <output_dtype: int = 17> (all_BJCA, unit)
}
"""
