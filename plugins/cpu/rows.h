// For ops that are bound by memory and not by arithmetic: rows in any compute dtype as float32, a tile at a time, and
// the functions of float32 that they need. The loops are plain enough for the compiler to vectorize.
#pragma once

#include <algorithm>

#include "plugins/cpu/flow.h"
#include "plugins/cpu/kernel.h"

namespace glm {
namespace {

constexpr size_t kTile = 256;               // elements; stays in the first-level cache
constexpr size_t kElementsPerTask = 16384;  // some ten microseconds, several times what handing out a task costs
constexpr size_t kMostTasks = 64;

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline float f16_to_f32(uint16_t value) {
  const uint32_t magnitude = static_cast<uint32_t>(value & 0x7fffu) << 13;
  // The exponent's bias differs by 112; a product moves it, subnormals included, and is exact.
  const uint32_t finite = bits_of(float_of(magnitude) * 0x1p112f);
  const uint32_t bits = magnitude >= 0x7c00u << 13 ? magnitude | 0x7f800000u : finite;
  return float_of(bits | static_cast<uint32_t>(value & 0x8000u) << 16);
}

// Rounds to nearest even, overflows to infinity, keeps subnormals and NaN.
inline uint16_t f32_to_f16(float value) {
  const uint32_t bits = bits_of(value), magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Below 2^-14 the last place is 2^-24, which is also that of 0.5: the sum rounds at the right one.
  const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
  uint32_t result = magnitude < 0x38800000u ? subnormal : normal;
  result = magnitude >= 0x47800000u ? 0x7c00u : result;
  result = magnitude > 0x7f800000u ? 0x7e00u : result;
  return static_cast<uint16_t>(result | (bits >> 16 & 0x8000u));
}

// Elements start .. start + count of x as float32: in place where they are, otherwise converted into `buffer`.
inline const float* load_f32(Type type, const void* x, size_t start, size_t count, float* buffer) {
  if (type == Type::f32) return static_cast<const float*>(x) + start;
  const uint16_t* from = static_cast<const uint16_t*>(x) + start;
  if (type == Type::bf16) {
    for (size_t i = 0; i < count; ++i) buffer[i] = bf16_to_f32(from[i]);
  } else {
    for (size_t i = 0; i < count; ++i) buffer[i] = f16_to_f32(from[i]);
  }
  return buffer;
}

// The one rounding of an op. `values` may be where they are to go.
inline void store_f32(Type type, const float* values, size_t start, size_t count, void* y) {
  if (type == Type::f32) {
    std::memmove(static_cast<float*>(y) + start, values, count * sizeof(float));
    return;
  }
  uint16_t* to = static_cast<uint16_t*>(y) + start;
  if (type == Type::bf16) {
    for (size_t i = 0; i < count; ++i) to[i] = f32_to_bf16(values[i]);
  } else {
    for (size_t i = 0; i < count; ++i) to[i] = f32_to_f16(values[i]);
  }
}

// Rounds x to a compute dtype, in place.
inline void round_f32(Type type, float* x, size_t count) {
  if (type == Type::f32) return;
  uint16_t rounded[kTile];
  for (size_t start = 0; start < count; start += kTile) {
    const size_t n = std::min(kTile, count - start);
    store_f32(type, x + start, 0, n, rounded);
    load_f32(type, rounded, 0, n, x + start);
  }
}

// e^x within 2 units in the last place: x = n ln 2 + r with |r| <= ln 2 / 2, the Taylor series to r^7 (its rest is
// below 2^-27), and 2^n in two factors so that results may be subnormal or infinite. NaN stays NaN.
inline float exp_f32(float x) {
  constexpr float kLog2E = 0x1.715476p0f;
  constexpr float kLn2High = 0x1.62e4p-1f;  // few bits: n times it is exact
  constexpr float kLn2Low = 0x1.7f7d1cp-20f;
  constexpr float kRound = 0x1.8p23f;  // adding it rounds to an integer, in the lowest bits
  x = x > 89.0f ? 89.0f : x;
  x = x < -104.0f ? -104.0f : x;
  const float shifted = x * kLog2E + kRound;
  const float n = shifted - kRound;
  const float r = (x - n * kLn2High) - n * kLn2Low;
  float p = 1.0f / 5040;
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * (r * r) + r + 1.0f;
  const int32_t exponent = static_cast<int32_t>(bits_of(shifted) - bits_of(kRound));
  const int32_t half = exponent >> 1;
  const float first = float_of(static_cast<uint32_t>(half + 127) << 23);
  const float second = float_of(static_cast<uint32_t>(exponent - half + 127) << 23);
  return p * first * second;
}

inline float sigmoid_f32(float x) { return 1.0f / (1.0f + exp_f32(-x)); }

// Splits `count` items evenly: task(begin, end) for each part, with `size` elements per item. As a stage of a flow.
template <class Task>
Flow::Done split(Flow& flow, Flow::Done needs, size_t count, size_t size, const Task& task,
                 size_t elements_per_task = kElementsPerTask) {
  const size_t per_task = std::max<size_t>(1, elements_per_task / std::max<size_t>(1, size));
  const size_t tasks = tasks_for(count, per_task, kMostTasks);
  return flow.stage({tasks, needs, [=](size_t i) { task(count * i / tasks, count * (i + 1) / tasks); }});
}

// In a loop of its own.
template <class Task>
void split(const Parallel& parallel, size_t count, size_t size, const Task& task) {
  Flow flow;
  split(flow, 0, count, size, task);
  flow.run(parallel);
}

}  // namespace
}  // namespace glm
