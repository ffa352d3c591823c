// MoEExperts and FP8MoEExperts, with or without a shared expert, without anything of ONNX Runtime.
#pragma once

#include <functional>

#include "plugins/cpu/flow.h"
#include "plugins/cpu/gemm.h"

namespace glm {

// An expert that every token goes through, of the dtype of the others. Scales are those of e4m3, else null.
struct SharedExpert {
  size_t F;
  const void* gate;         // [F, D]
  const float* gate_scale;  // [F]
  const void* up;           // [F, D]
  const float* up_scale;    // [F]
  const void* down;         // [D, F]
  const float* down_scale;  // [D]
};

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
  void* out;                   // [T, D] of x_type
  const SharedExpert* shared;  // or null; its output, rounded, is added to that of the others, rounded
};

// What goes on in the same flow, for the tokens first .. first + count.
struct Around {
  // Adds the stages that find expert ids and weights, which otherwise are there; returns the last one.
  std::function<Flow::Done(Flow& flow, size_t first, size_t count)> before;
  // Adds stages that need the output.
  std::function<void(Flow& flow, size_t first, size_t count, Flow::Done out)> after;
};

// Returns how many experts' weights were needed: each counts once, however many tokens chose it, but again for every
// 1024 tokens. Throws std::invalid_argument when an expert id is not in 0 .. E-1.
size_t experts(const ExpertsArguments& a, const Gemm& gemm, const Parallel& parallel, const Around& around = {});

}  // namespace glm
