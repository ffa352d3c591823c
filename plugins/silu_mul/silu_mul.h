// Elements begin .. end of y = silu(gate) * up, for every instruction set. The loop is the same; it is compiled three
// times because it is bound by the exponential and not by memory.
#pragma once

#include "plugins/cpu/kernel.h"

namespace glm {

struct SiluMulTensors {
  Type gate_type, up_type, y_type;
  const void* gate;  // [..., F]
  const void* up;    // [..., F]
  void* y;           // [..., F]
};

void silu_mul_scalar(const SiluMulTensors& tensors, size_t begin, size_t end);
void silu_mul_avx2(const SiluMulTensors& tensors, size_t begin, size_t end);
void silu_mul_avx512(const SiluMulTensors& tensors, size_t begin, size_t end);

}  // namespace glm
