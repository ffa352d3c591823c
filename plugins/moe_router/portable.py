"""ONNX TopK gives the lower index on ties, which is the rule of this op.

GatherElements has axis 1 and not -1, with which the ONNX reference evaluator fails.
"""

MOE_ROUTER = """
MoERouter <top_k, n_group, topk_group, norm_topk_prob, routed_scaling_factor>
    (logits, correction_bias) => (expert_ids, expert_weights) {
  last = Constant <value_ints: ints = [-1]> ()
  zero_i = Constant <value_ints: ints = [0]> ()
  one_f = Constant <value_float: float = 1.0> ()

  scores_TE = Sigmoid (logits)
  choice_TE = Add (scores_TE, correction_bias)

  n_group_0 = Constant <value_int: int = @n_group> ()
  n_group_1 = Unsqueeze (n_group_0, zero_i)
  shape_TE = Shape (choice_TE)
  shape_TGI = Concat <axis: int = 0> (zero_i, n_group_1, last)
  choice_TGI = Reshape (choice_TE, shape_TGI)
  group_size = Shape <start: int = 2> (choice_TGI)
  two = Constant <value_ints: ints = [2]> ()
  best_per_group = Min (two, group_size)
  best_TGI, best_ids = TopK <axis: int = -1> (choice_TGI, best_per_group)
  group_scores_TG = ReduceSum <keepdims: int = 0> (best_TGI, last)

  topk_group_0 = Constant <value_int: int = @topk_group> ()
  topk_group_1 = Unsqueeze (topk_group_0, zero_i)
  group_values, groups = TopK <axis: int = -1> (group_scores_TG, topk_group_1)
  shape_TG = Shape (group_scores_TG)
  drop_TG = ConstantOfShape (shape_TG)
  shape_groups = Shape (groups)
  chosen = Expand (one_f, shape_groups)
  keep_TG = ScatterElements <axis: int = 1> (drop_TG, groups, chosen)
  keep_TG_bool = Cast <to: int = 9> (keep_TG)
  keep_TG1 = Unsqueeze (keep_TG_bool, last)
  minus_infinity = Constant <value: tensor = float {-inf}> ()
  masked_TGI = Where (keep_TG1, choice_TGI, minus_infinity)
  masked_TE = Reshape (masked_TGI, shape_TE)

  top_k_0 = Constant <value_int: int = @top_k> ()
  top_k_1 = Unsqueeze (top_k_0, zero_i)
  top_values, ids_TK = TopK <axis: int = -1> (masked_TE, top_k_1)
  weights_TK = GatherElements <axis: int = 1> (scores_TE, ids_TK)
  weight_sum = ReduceSum (weights_TK, last)
  epsilon = Constant <value_float: float = 1e-20> ()
  weight_sum_eps = Add (weight_sum, epsilon)
  normalize_i = Constant <value_int: int = @norm_topk_prob> ()
  normalize = Cast <to: int = 9> (normalize_i)
  denominator = Where (normalize, weight_sum_eps, one_f)
  normed_TK = Div (weights_TK, denominator)
  scaling = Constant <value_float: float = @routed_scaling_factor> ()
  expert_weights = Mul (normed_TK, scaling)
  expert_ids = Cast <to: int = 6> (ids_TK)
}
"""
