// For test_cuda_experts.py: the host's part of the expert kernels, without a launch.
#include "plugins/moe_experts/plan.h"

// Everything a plan holds, and what it covers; 0 where there is none.
extern "C" __attribute__((visibility("default"))) int32_t experts_plan(int32_t T, int32_t D, int32_t F, int32_t E,
                                                                       int32_t K, int32_t hidden_type,
                                                                       int32_t weight_type, int32_t path,
                                                                       int64_t (&found)[20]) {
  const glm::ExpertSizes sizes{T, D, F, E, K, hidden_type, weight_type};
  glm::Device device;
  glm::ExpertPlan plan{};
  if (glm::current_device(device) != 0 || !glm::plan_experts(sizes, device, path, plan)) return 0;
  int64_t* to = found;
  *to++ = plan.path;
  *to++ = plan.run_tokens;
  for (const glm::ProductPlan* product : {&plan.gate_up, &plan.down}) {
    *to++ = product->tiles;
    *to++ = product->blocks;
    *to++ = product->shared_bytes;
    *to++ = product->decode.tokens;
    *to++ = product->decode.row_stride;
    *to++ = product->decode.splits;
    *to++ = product->decode.depth;
  }
  return 1;
}
