// What all forms of gemm.h share; compiled once per instruction set, so everything has internal linkage.
#pragma once

#include <algorithm>

#include "plugins/cpu/gemm.h"
#include "plugins/cpu/rows.h"

namespace glm {
namespace {

// The E4M3 number nearest to v, ties to even, |v| <= 448 (a little more rounds back to 448). NaN stays NaN.
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
  result = absolute == absolute ? result : absolute;  // a carry may have gone beyond the exponent
  return float_of(bits_of(result) | sign);
}

inline float quantize_row(float* x, size_t width) {
  // Without their sign, numbers are ordered like their bits, which compilers compare many at a time.
  uint32_t largest = 0;
  for (size_t i = 0; i < width; ++i) largest = std::max(largest, bits_of(x[i]) & 0x7fffffffu);
  float scale = float_of(largest) / 448.0f;
  if (!(scale > 0)) scale = 1;
  for (size_t i = 0; i < width; ++i) x[i] = round_to_e4m3(x[i] / scale);
  return scale;
}

inline void silu_mul(const float* gate, const float* up, size_t width, float* out) {
  for (size_t i = 0; i < width; ++i) out[i] = gate[i] * sigmoid_f32(gate[i]) * up[i];
}

}  // namespace
}  // namespace glm
