// Linear and FP8Linear: y = x @ weight^T + bias, for one or several weights; without anything of ONNX Runtime.
#pragma once

#include "plugins/cpu/packed_rows.h"

namespace glm {

// One weight and what it gives.
struct LinearPart {
  const void* weight;         // [O, I]
  const float* weight_scale;  // [O] for e4m3, else null
  const float* bias;          // [O] or null
  size_t O;
  void* y;  // [T, O] of y_type
};

struct LinearArguments {
  Type x_type;       // f32, bf16 or f16
  const void* x;     // [T, I], packed once for all parts
  Type weight_type;  // f32, bf16, f16 or e4m3
  Type y_type;       // f32, bf16 or f16
  size_t T, I;
  const LinearPart* parts;
  size_t part_count;
};

// Adds the stages to a flow; returns the last one. What the arguments point to, and `rows`, for x as it is multiplied,
// stay until the flow has run; x is there when `needs` is done.
Flow::Done add_linear(Flow& flow, const LinearArguments& a, const Gemm& gemm, PackedRows& rows, Flow::Done needs);

void linear(const LinearArguments& a, const Gemm& gemm, const Parallel& parallel);

}  // namespace glm
