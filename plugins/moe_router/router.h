// MoERouter without anything of ONNX Runtime.
#pragma once

#include "plugins/cpu/flow.h"

namespace glm {

struct RouterArguments {
  const float* logits;   // [T, E]
  const float* bias;     // [E]
  size_t T, E, K;        // 1 <= K <= E
  size_t G, topk_group;  // groups, which divide E, and how many of them are kept
  bool normalize;
  float scaling;
  int32_t* expert_ids;    // [T, K]
  float* expert_weights;  // [T, K]
};

// Adds a stage to a flow. The logits are there when `needs` is done.
Flow::Done add_route(Flow& flow, const RouterArguments& a, Flow::Done needs);

void route(const RouterArguments& a, const Parallel& parallel);

}  // namespace glm
