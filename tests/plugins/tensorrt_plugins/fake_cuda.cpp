// Stands in for libglm_cuda.so: does nothing, and writes down what it was called with. Code 7 is its only error.
#include <cstdarg>
#include <cstdio>
#include <string>

#include "plugins/cuda/launch.h"

static std::string& journal() {
  static std::string text;
  return text;
}

static int32_t note(const char* format, ...) {
  char line[512];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(line, sizeof line, format, arguments);
  va_end(arguments);
  journal() += std::string(line) + "\n";
  return 0;
}

static long long at(const void* pointer) { return reinterpret_cast<long long>(pointer); }

// What was called since the last time.
extern "C" GLM_CUDA_API const char* fake_journal() {
  static std::string taken;
  taken.swap(journal());
  journal().clear();
  return taken.c_str();
}

int32_t glm_cuda_abi(void) { return GLM_CUDA_ABI; }

const char* glm_cuda_error(int32_t code) {
  return code == 7 ? "hidden_type is not supported" : "an unknown error code";
}

int32_t glm_cuda_moe_router(const float* logits, const float* correction_bias, int32_t* expert_ids,
                            float* expert_weights, int32_t T, int32_t E, int32_t top_k, int32_t n_group,
                            int32_t topk_group, int32_t norm_topk_prob, float routed_scaling_factor, void* stream) {
  return note("moe_router %lld %lld %lld %lld T%d E%d %d %d %d %d %g stream %lld", at(logits), at(correction_bias),
              at(expert_ids), at(expert_weights), T, E, top_k, n_group, topk_group, norm_topk_prob,
              routed_scaling_factor, at(stream));
}

int32_t glm_cuda_moe_experts(const void* hidden, const int32_t* expert_ids, const float* expert_weights,
                             const void* gate_up, const float* gate_up_scale, const void* down, const float* down_scale,
                             void* out, void* workspace, int64_t workspace_bytes, int32_t T, int32_t D, int32_t F,
                             int32_t E, int32_t K, int32_t hidden_type, int32_t weight_type, int32_t path,
                             void* stream) {
  return note(
      "moe_experts %lld %lld %lld %lld %lld %lld %lld %lld workspace %lld %lld T%d D%d F%d E%d K%d types %d %d "
      "path %d stream %lld",
      at(hidden), at(expert_ids), at(expert_weights), at(gate_up), at(gate_up_scale), at(down), at(down_scale), at(out),
      at(workspace), static_cast<long long>(workspace_bytes), T, D, F, E, K, hidden_type, weight_type, path,
      at(stream));
}

int64_t glm_cuda_moe_experts_workspace(int32_t T, int32_t D, int32_t F, int32_t E, int32_t K, int32_t hidden_type,
                                       int32_t weight_type) {
  note("workspace T%d D%d F%d E%d K%d types %d %d", T, D, F, E, K, hidden_type, weight_type);
  return weight_type == GLM_CUDA_F32 ? -7 : 256LL * T;
}

int32_t glm_cuda_fp8_cache_write(void* cache, const void* update, const int32_t* write_index, int32_t B, int32_t J,
                                 int32_t C, int32_t S, int32_t A, int32_t update_type, void* stream) {
  return note("fp8_cache_write %lld %lld %lld B%d J%d C%d S%d A%d type %d stream %lld", at(cache), at(update),
              at(write_index), B, J, C, S, A, update_type, at(stream));
}
