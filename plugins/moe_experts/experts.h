// MoEExperts and FP8MoEExperts, without anything of ONNX Runtime.
#pragma once

#include "plugins/cpu/gemm.h"

namespace glm {

struct ExpertsArguments {
  Type x_type;                  // f32, bf16 or f16
  const void* hidden;           // [T, D]
  const int32_t* expert_ids;    // [T, K]
  const float* expert_weights;  // [T, K]
  Type weight_type;             // f32, bf16, f16 or e4m3
  const void* gate_up;          // [E, 2F, D], gate rows first
  const float* gate_up_scale;   // [E, 2F] for e4m3, else null
  const void* down;             // [E, D, F]
  const float* down_scale;      // [E, D] for e4m3, else null
  size_t T, K, E, D, F;
  void* out;  // [T, D] of x_type
};

// Throws std::invalid_argument when an expert id is not in 0 .. E-1.
void experts(const ExpertsArguments& a, const Gemm& gemm, const Parallel& parallel);

}  // namespace glm
