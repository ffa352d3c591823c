"""A Scan over the experts, with an If that skips those nobody chose.

Scan hands each expert's weights to its body as a view, for every dtype (ONNX Gather and Slice do not take FP8), so that
only chosen experts are converted to float32 and none is copied.
"""

_BODY = """
NAME (hidden, expert_ids, expert_weights, WEIGHTS) => (out) {
  hidden_f32 = Cast <to: int = 1> (hidden)
  x_TD = ROUND_X (hidden_f32)
  shape_TD = Shape (x_TD)
  zeros_TD = ConstantOfShape (shape_TD)
  first = Constant <value: tensor = int32 {0}> ()
  end, out_TD = Scan <num_scan_inputs: int = COUNT, body: graph = one_expert
      (int32 e, float[T,D] sum_TD, SCAN_TYPES) => (int32 next_e, float[T,D] next_sum_TD) {
    one = Constant <value: tensor = int32 {1}> ()
    next_e = Add (e, one)
    axis_0 = Constant <value_ints: ints = [0]> ()
    axis_1 = Constant <value_ints: ints = [1]> ()
    chosen_TK = Equal (expert_ids, e)
    chosen_TK_f32 = Cast <to: int = 1> (chosen_TK)
    weight_TK = Mul (chosen_TK_f32, expert_weights)
    weight_T1 = ReduceSum (weight_TK, axis_1)
    chosen_T = ReduceMax <keepdims: int = 0> (chosen_TK_f32, axis_1)
    token_1N = NonZero (chosen_T)
    token_N = Squeeze (token_1N, axis_0)
    count = Size (token_N)
    none = Constant <value_int: int = 0> ()
    any = Greater (count, none)
    next_sum_TD = If (any) <
      then_branch: graph = compute () => (float[T,D] added_TD) {
        x_ND = Gather (x_TD, token_N)
        gate_up_f32 = GATE_UP_F32
        gate_up_N2F = Gemm <transB: int = 1> (x_ND, gate_up_f32)
        gate_NF, up_NF = Split <axis: int = -1, num_outputs: int = 2> (gate_up_N2F)
        sigmoid_NF = Sigmoid (gate_NF)
        silu_NF = Mul (gate_NF, sigmoid_NF)
        h_NF = Mul (silu_NF, up_NF)
        h_rounded = CastLike (h_NF, hidden)
        h_rounded_f32 = Cast <to: int = 1> (h_rounded)
        h_hat_NF = ROUND_H (h_rounded_f32)
        down_f32 = DOWN_F32
        y_ND = Gemm <transB: int = 1> (h_hat_NF, down_f32)
        weight_N1 = Gather (weight_T1, token_N)
        weighted_ND = Mul (y_ND, weight_N1)
        token_N1 = Unsqueeze (token_N, axis_1)
        added_TD = ScatterND <reduction: string = "add"> (sum_TD, token_N1, weighted_ND)
      },
      else_branch: graph = skip () => (float[T,D] same_TD) { same_TD = Identity (sum_TD) }
    >
  }> (first, zeros_TD, WEIGHTS)
  out = CastLike (out_TD, hidden)
}
"""


def _body(substitutions: dict[str, str]) -> str:
    text = _BODY
    for placeholder, value in substitutions.items():
        text = text.replace(placeholder, value)
    return text


def moe_experts(dtype: str) -> str:
    """The body for expert weights of an ONNX text dtype: float, bfloat16 or float16; a Scan body states its types."""
    return _body(
        {
            "NAME": "MoEExperts",
            "WEIGHTS": "gate_up, down",
            "COUNT": "2",
            "SCAN_TYPES": f"{dtype}[N,D] gate_up_e, {dtype}[D,F] down_e",
            "GATE_UP_F32": "Cast <to: int = 1> (gate_up_e)",
            "DOWN_F32": "Cast <to: int = 1> (down_e)",
            "ROUND_X": "Identity",
            "ROUND_H": "Identity",
        }
    )


FP8_MOE_EXPERTS = _body(
    {
        "NAME": "FP8MoEExperts",
        "WEIGHTS": "gate_up, gate_up_scale, down, down_scale",
        "COUNT": "4",
        "SCAN_TYPES": (
            "float8e4m3fn[N,D] gate_up_e, float[N] gate_up_scale_e, float8e4m3fn[D,F] down_e, float[D] down_scale_e"
        ),
        "GATE_UP_F32": "DequantizeLinear <axis: int = 0> (gate_up_e, gate_up_scale_e)",
        "DOWN_F32": "DequantizeLinear <axis: int = 0> (down_e, down_scale_e)",
        "ROUND_X": "FakeQuantizeRows",
        "ROUND_H": "FakeQuantizeRows",
    }
)
