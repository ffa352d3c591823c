// What all forms of gemm.h share; compiled once per instruction set, so everything has internal linkage.
#pragma once

#include <cmath>

#include "plugins/cpu/gemm.h"
#include "plugins/cpu/rows.h"

namespace glm {
namespace {

// The E4M3 number nearest to v, ties to even, |v| <= 448 (a little more rounds back to 448).
inline float round_to_e4m3(float v) {
  const uint32_t sign = bits_of(v) & 0x80000000u;
  const uint32_t magnitude = bits_of(v) & 0x7fffffffu;
  // Normal numbers keep three bits of mantissa.
  const float normal = float_of((magnitude + 0x7ffffu + ((magnitude >> 20) & 1u)) & 0xfff00000u);
  // Below 2^-6 the numbers are multiples of 2^-9: adding 1.5 * 2^14 leaves exactly those bits.
  const float absolute = float_of(magnitude);
  const float subnormal = (absolute + 0x1.8p14f) - 0x1.8p14f;
  float result = absolute < 0x1p-6f ? subnormal : normal;
  result = result > 448.0f ? 448.0f : result;
  return float_of(bits_of(result) | sign);
}

inline float quantize_row(float* x, size_t width) {
  float amax = 0;
  for (size_t i = 0; i < width; ++i) {
    const float magnitude = std::fabs(x[i]);
    amax = magnitude > amax ? magnitude : amax;
  }
  float scale = amax / 448.0f;
  if (!(scale > 0)) scale = 1;
  for (size_t i = 0; i < width; ++i) x[i] = round_to_e4m3(x[i] / scale);
  return scale;
}

inline void silu_mul(const float* gate, const float* up, size_t width, float* out) {
  for (size_t i = 0; i < width; ++i) out[i] = gate[i] * sigmoid_f32(gate[i]) * up[i];
}

}  // namespace
}  // namespace glm
