#pragma once

#include "plugins/cpu/rows.h"
#include "plugins/silu_mul/silu_mul.h"

namespace glm {
namespace {

inline void silu_mul(const SiluMulTensors& t, size_t begin, size_t end) {
  float gate_buffer[kTile], up_buffer[kTile], product[kTile];
  for (size_t start = begin; start < end; start += kTile) {
    const size_t count = std::min(kTile, end - start);
    const float* gate = load_f32(t.gate_type, t.gate, start, count, gate_buffer);
    const float* up = load_f32(t.up_type, t.up, start, count, up_buffer);
    for (size_t i = 0; i < count; ++i) product[i] = gate[i] * sigmoid_f32(gate[i]) * up[i];
    store_f32(t.y_type, product, start, count, t.y);
  }
}

}  // namespace
}  // namespace glm
