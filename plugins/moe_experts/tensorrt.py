"""Every expert computes every token, batched, and the sum takes the chosen ones: for tests and small models.

A real model's experts are a plugin, or `TRT_MoE` on the GPUs that have it: SM100, SM103 and SM110.
"""

from __future__ import annotations

_DENSE = """
NAME (hidden, expert_ids, expert_weights, WEIGHTS) => (out) {
  axis_0 = Constant <value_ints: ints = [0]> ()
  axis_1 = Constant <value_ints: ints = [1]> ()
  last = Constant <value_ints: ints = [-1]> ()
  first = Constant <value_int: int = 0> ()
  step = Constant <value_int: int = 1> ()
  count_1 = Shape <start: int = 0, end: int = 1> (gate_up)
  count = Squeeze (count_1)
  expert_E_i64 = Range (first, count, step)
  expert_E = Cast <to: int = 6> (expert_E_i64)
  id_TK1 = Unsqueeze (expert_ids, last)
  chosen_TKE = Equal (id_TK1, expert_E)
  chosen_TKE_f32 = Cast <to: int = 1> (chosen_TKE)
  weight_TK1 = Unsqueeze (expert_weights, last)
  weighted_TKE = Mul (chosen_TKE_f32, weight_TK1)
  weight_TE = ReduceSum <keepdims: int = 0> (weighted_TKE, axis_1)
  weight_ET = Transpose (weight_TE)
  weight_ET1 = Unsqueeze (weight_ET, last)

  hidden_f32 = Cast <to: int = 1> (hidden)
  x_1TD = Unsqueeze (hidden_f32, axis_0)
  GATE_UP
  gate_ETF, up_ETF = Split <axis: int = -1, num_outputs: int = 2> (gate_up_ET2F)
  sigmoid_ETF = Sigmoid (gate_ETF)
  silu_ETF = Mul (gate_ETF, sigmoid_ETF)
  h_ETF_f32 = Mul (silu_ETF, up_ETF)
  h_ETF_rounded = CastLike (h_ETF_f32, hidden)
  h_ETF = Cast <to: int = 1> (h_ETF_rounded)
  DOWN
  weighted_ETD = Mul (y_ETD, weight_ET1)
  out_TD = ReduceSum <keepdims: int = 0> (weighted_ETD, axis_0)
  out = CastLike (out_TD, hidden)
}
"""

_PRODUCT = """
  WEIGHT_f32 = Cast <to: int = 1> (WEIGHT)
  WEIGHT_transposed = Transpose <perm: ints = [0, 2, 1]> (WEIGHT_f32)
  RESULT = MatMul (X, WEIGHT_transposed)
"""

_FP8_PRODUCT = """
  WEIGHT_x, WEIGHT_x_scale = RoundRows (X)
  WEIGHT_unit = Constant <value_float: float = 1.0> ()
  WEIGHT_f32 = DequantizeLinear (WEIGHT, WEIGHT_unit)
  WEIGHT_transposed = Transpose <perm: ints = [0, 2, 1]> (WEIGHT_f32)
  WEIGHT_product = MatMul (WEIGHT_x, WEIGHT_transposed)
  WEIGHT_row_scale = Unsqueeze (WEIGHT_scale, axis_1)
  WEIGHT_scales = Mul (WEIGHT_x_scale, WEIGHT_row_scale)
  RESULT = Mul (WEIGHT_product, WEIGHT_scales)
"""


def _dense(name: str, weights: str, product: str) -> str:
    def of(x: str, weight: str, result: str) -> str:
        return product.strip().replace("WEIGHT", weight).replace("RESULT", result).replace("X", x)

    text = _DENSE.replace("NAME", name).replace("WEIGHTS", weights)
    text = text.replace("GATE_UP", of("x_1TD", "gate_up", "gate_up_ET2F"))
    return text.replace("DOWN", of("h_ETF", "down", "y_ETD"))


MOE_EXPERTS = _dense("MoEExperts", "gate_up, down", _PRODUCT)
FP8_MOE_EXPERTS = _dense("FP8MoEExperts", "gate_up, gate_up_scale, down, down_scale", _FP8_PRODUCT)

# TRT_MoE wants the weights the other way round, gate and up apart, and the routing weights in the dtype of hidden.
TRT_MOE_EXPERTS = """
MoEExperts (hidden, expert_ids, expert_weights, gate_up, down) => (out) {
  axis_0 = Constant <value_ints: ints = [0]> ()
  hidden_1TD = Unsqueeze (hidden, axis_0)
  expert_ids_1TK = Unsqueeze (expert_ids, axis_0)
  expert_weights_TK = CastLike (expert_weights, hidden)
  expert_weights_1TK = Unsqueeze (expert_weights_TK, axis_0)
  gate_up_ED2F = Transpose <perm: ints = [0, 2, 1]> (gate_up)
  gate_EDF, up_EDF = Split <axis: int = -1, num_outputs: int = 2> (gate_up_ED2F)
  down_EFD = Transpose <perm: ints = [0, 2, 1]> (down)
  out_1TD = trt.TRT_MoE <activation_type: int = 1>
      (hidden_1TD, expert_ids_1TK, expert_weights_1TK, gate_EDF, up_EDF, down_EFD)
  out = Squeeze (out_1TD, axis_0)
}
"""
