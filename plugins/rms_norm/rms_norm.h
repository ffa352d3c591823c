// The normalization of one row; compiled into every op that has it.
// Once over the row for its sum of squares, once more for the result. Sixteen partial sums, because a single one can
// not be vectorized; the second pass finds the row in the cache.
#pragma once

#include <cmath>

#include "plugins/cpu/rows.h"

namespace glm {
namespace {

constexpr size_t kLanes = 16;

inline float sum_of_squares(Type type, const void* x, size_t begin, size_t D) {
  float buffer[kTile], lanes[kLanes] = {};
  for (size_t start = 0; start < D; start += kTile) {
    const size_t count = std::min(kTile, D - start);
    const float* values = load_f32(type, x, begin + start, count, buffer);
    size_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
      for (size_t lane = 0; lane < kLanes; ++lane) lanes[lane] += values[i + lane] * values[i + lane];
    }
    for (; i < count; ++i) lanes[i % kLanes] += values[i] * values[i];
  }
  for (size_t half = kLanes / 2; half > 0; half /= 2) {
    for (size_t lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  }
  return lanes[0];
}

// Row `row` of y [.., D], which has the type of x [.., D]; weight [D].
inline void rms_norm_row(Type type, const void* x, const float* weight, float epsilon, size_t row, size_t D, void* y) {
  float buffer[kTile], result[kTile];
  const float mean = sum_of_squares(type, x, row * D, D) / static_cast<float>(D);
  const float factor = 1.0f / std::sqrt(mean + epsilon);
  for (size_t start = 0; start < D; start += kTile) {
    const size_t count = std::min(kTile, D - start);
    const float* values = load_f32(type, x, row * D + start, count, buffer);
    for (size_t i = 0; i < count; ++i) result[i] = values[i] * factor * weight[start + i];
    store_f32(type, result, row * D + start, count, y);
  }
}

}  // namespace
}  // namespace glm
