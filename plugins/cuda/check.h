// The arguments of launch.h, checked on the host before anything is started. The first wrong one becomes the code.
#pragma once

#include <cstdint>

#include "plugins/cuda/launch.h"

namespace glm {

// All names that arguments of launch.h have, and what may be wrong with one.
// clang-format off
#define GLM_CUDA_ARGUMENTS(X)                                                                                        \
  X(logits) X(correction_bias) X(expert_ids) X(expert_weights)                                                       \
  X(hidden) X(gate_up) X(gate_up_scale) X(down) X(down_scale) X(out) X(workspace) X(workspace_bytes)                 \
  X(cache) X(update) X(write_index)                                                                                  \
  X(T) X(D) X(F) X(E) X(K) X(B) X(J) X(C) X(S) X(A)                                                                  \
  X(top_k) X(n_group) X(topk_group) X(norm_topk_prob)                                                                \
  X(hidden_type) X(weight_type) X(update_type) X(path) X(device)

#define GLM_CUDA_FAULTS(X)                                                                                           \
  X(null, "is null") X(misaligned, "is not aligned") X(out_of_range, "is out of range")                              \
  X(unsupported, "is not supported") X(too_small, "is too small") X(not_null, "has to be null")
// clang-format on

#define GLM_CUDA_NAME(name, ...) name,
enum class Argument { none, GLM_CUDA_ARGUMENTS(GLM_CUDA_NAME) };
enum class Fault { none, GLM_CUDA_FAULTS(GLM_CUDA_NAME) };
#undef GLM_CUDA_NAME

class Check {
 public:
  int code() const { return code_; }

  void that(bool holds, Argument argument, Fault fault) {
    if (!holds && code_ == 0) code_ = static_cast<int>(argument) * 16 + static_cast<int>(fault);
  }

  // `alignment` in bytes.
  void pointer(Argument argument, const void* pointer, uintptr_t alignment) {
    that(pointer != nullptr, argument, Fault::null);
    that(reinterpret_cast<uintptr_t>(pointer) % alignment == 0, argument, Fault::misaligned);
  }

  void range(Argument argument, int64_t value, int64_t least, int64_t most) {
    that(least <= value && value <= most, argument, Fault::out_of_range);
  }

  void multiple(Argument argument, int64_t value, int64_t of) { that(value % of == 0, argument, Fault::unsupported); }

 private:
  int code_ = 0;
};

}  // namespace glm
