"""Per-row FP8 rounding as ONNX functions that other bodies call (the ONNX form of fp8.fake_quantize_rows)."""

_ROUND = """
  magnitude = Abs (x_TI)
  last = Constant <value_ints: ints = [-1]> ()
  amax_T = ReduceMax <keepdims: int = 0> (magnitude, last)
  e4m3_max = Constant <value_float: float = 448.0> ()
  raw_scale_T = Div (amax_T, e4m3_max)
  zero = Constant <value_float: float = 0.0> ()
  one = Constant <value_float: float = 1.0> ()
  positive_T = Greater (raw_scale_T, zero)
  scale_T = Where (positive_T, raw_scale_T, one)
  scale_T1 = Unsqueeze (scale_T, last)
  scaled_TI = Div (x_TI, scale_T1)
  unit = Constant <value_float: float = 1.0> ()
  values_TI = QuantizeLinear <output_dtype: int = 17> (scaled_TI, unit)
  rounded_TI = DequantizeLinear (values_TI, unit)
"""

ROUND_ROWS = f"""
RoundRows (x_TI) => (rounded_TI, scale_T1) {{{_ROUND}}}
"""

FAKE_QUANTIZE_ROWS = f"""
FakeQuantizeRows (x_TI) => (x_hat_TI) {{{_ROUND}  x_hat_TI = Mul (rounded_TI, scale_T1)
}}
"""
