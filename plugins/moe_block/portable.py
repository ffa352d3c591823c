"""Every E4M3 weight goes through an Identity, for ONNX Runtime, as in qkv_linear/portable.py."""

_BODY = """
NAME <top_k, n_group, topk_group, norm_topk_prob, routed_scaling_factor, epsilon>
    (x, router_weight, correction_bias, WEIGHTS, residual, norm_weight) => (sum, y) {
IDENTITIES  any = Constant <value_ints: ints = [-1]> ()
  hidden_size = Shape <start: int = -1> (x)
  shape_TD = Concat <axis: int = 0> (any, hidden_size)
  x_TD = Reshape (x, shape_TD)
  x_TD_f32 = Cast <to: int = 1> (x_TD)
  logits_TE = Linear (x_TD_f32, router_weight, "")
  expert_ids, expert_weights = MoERouter <
    top_k: int = @top_k,
    n_group: int = @n_group,
    topk_group: int = @topk_group,
    norm_topk_prob: int = @norm_topk_prob,
    routed_scaling_factor: float = @routed_scaling_factor
  > (logits_TE, correction_bias)
  routed_TD = PREFIXMoEExperts (x_TD, expert_ids, expert_weights, EXPERTS)
  shape_BSD = Shape (x)
  routed = Reshape (routed_TD, shape_BSD)
  gate = PREFIXLinear (x, GATE, "")
  up = PREFIXLinear (x, UP, "")
  h = SiluMul (gate, up)
  shared = PREFIXLinear (h, DOWN, "")
  update = ResidualAdd (routed, shared)
  sum = ResidualAdd (residual, update)
  y = RMSNorm <epsilon: float = @epsilon> (sum, norm_weight)
}
"""


_WEIGHTS = ("gate_up", "down", "shared_gate", "shared_up", "shared_down")


def _body(prefix: str) -> str:
    scaled = {name: f"{name}_e4m3, {name}_scale" if prefix else name for name in _WEIGHTS}
    substitutions = {
        "NAME": f"{prefix}MoEBlock",
        "PREFIX": prefix,
        "WEIGHTS": ", ".join(f"{name}, {name}_scale" if prefix else name for name in _WEIGHTS),
        "IDENTITIES": "".join(f"  {name}_e4m3 = Identity ({name})\n" for name in _WEIGHTS if prefix),
        "EXPERTS": f"{scaled['gate_up']}, {scaled['down']}",
        "GATE": scaled["shared_gate"],
        "UP": scaled["shared_up"],
        "DOWN": scaled["shared_down"],
    }
    text = _BODY
    for placeholder, value in substitutions.items():
        text = text.replace(placeholder, value)
    return text


MOE_BLOCK = _body("")
FP8_MOE_BLOCK = _body("FP8")
