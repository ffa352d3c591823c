// A row is read twice, the second time from the first-level cache: for its largest magnitude, which says by itself
// whether all of it is finite, and to be scaled, rounded and stored as bytes.
#pragma once

#include "plugins/cpu/quantize.h"
#include "plugins/cpu/rows.h"

namespace glm {
namespace {

// The largest |x| as the bits of its type: without their sign, floating-point numbers are ordered like integers, with
// infinity and NaN last.
template <class Bits>
inline Bits largest_magnitude(const Bits* x, size_t count) {
  constexpr Bits kMagnitude = static_cast<Bits>(~Bits{0}) >> 1;
  Bits largest = 0;
  for (size_t i = 0; i < count; ++i) {
    const Bits magnitude = x[i] & kMagnitude;
    largest = magnitude > largest ? magnitude : largest;
  }
  return largest;
}

// The byte of the E4M3 number nearest to v, ties to even, saturated.
inline uint32_t e4m3_byte(float v) {
  const uint32_t bits = bits_of(v), magnitude = bits & 0x7fffffffu;
  // Three bits of mantissa stay; the exponent's bias is 7, not 127.
  const uint32_t normal = ((magnitude + 0x7ffffu + ((magnitude >> 20) & 1u)) >> 20) - (120u << 3);
  // Below 2^-6 the numbers are multiples of 2^-9, which is the last place of 2^14: the sum rounds at the right one.
  const uint32_t subnormal = bits_of(float_of(magnitude) + 0x1p14f) - bits_of(0x1p14f);
  const uint32_t rounded = magnitude < (121u << 23) ? subnormal : normal;
  return (rounded < 0x7eu ? rounded : 0x7eu) | (bits >> 24 & 0x80u);
}

inline void store_e4m3(const float* x, size_t count, float scale, uint8_t* values) {
  for (size_t i = 0; i < count; ++i) values[i] = static_cast<uint8_t>(e4m3_byte(x[i] / scale));
}

// One row; false if it is not finite. `store` is store_e4m3 or what is the same and faster.
template <class Bits, class Store>
inline bool quantize_row(Type type, Bits infinity, const Bits* x, size_t I, uint8_t* values, float* scale,
                         const Store& store) {
  const Bits largest = largest_magnitude(x, I);
  if (largest >= infinity) return false;
  float tile[kTile];
  *scale = *load_f32(type, &largest, 0, 1, tile) / 448.0f;
  if (!(*scale > 0)) *scale = 1;
  for (size_t start = 0; start < I; start += kTile) {
    const size_t count = std::min(kTile, I - start);
    store(load_f32(type, x, start, count, tile), count, *scale, values + start);
  }
  return true;
}

template <class Bits, class Store>
inline size_t quantize_rows(Type type, Bits infinity, const void* x, size_t O, size_t I, uint8_t* values, float* scales,
                            const Store& store) {
  const Bits* row = static_cast<const Bits*>(x);
  size_t o = 0;
  while (o < O && quantize_row(type, infinity, row + o * I, I, values + o * I, scales + o, store)) ++o;
  return o;
}

template <class Store>
inline size_t quantize_rows(Type type, const void* x, size_t O, size_t I, uint8_t* values, float* scales,
                            const Store& store) {
  if (type == Type::f32) return quantize_rows<uint32_t>(type, 0x7f800000u, x, O, I, values, scales, store);
  return quantize_rows<uint16_t>(type, type == Type::bf16 ? 0x7f80u : 0x7c00u, x, O, I, values, scales, store);
}

}  // namespace
}  // namespace glm
