// The sum of two tensors, rounded once; compiled into every op that has it.
#pragma once

#include "plugins/cpu/rows.h"

namespace glm {
namespace {

// y = x + update for the elements [begin, end); y has the type of x.
inline void residual_add(Type x_type, const void* x, Type update_type, const void* update, size_t begin, size_t end,
                         void* y) {
  float x_buffer[kTile], update_buffer[kTile], sum[kTile];
  for (size_t start = begin; start < end; start += kTile) {
    const size_t count = std::min(kTile, end - start);
    const float* a = load_f32(x_type, x, start, count, x_buffer);
    const float* b = load_f32(update_type, update, start, count, update_buffer);
    for (size_t i = 0; i < count; ++i) sum[i] = a[i] + b[i];
    store_f32(x_type, sum, start, count, y);
  }
}

}  // namespace
}  // namespace glm
