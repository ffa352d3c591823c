// Rows of weights to FP8, as plugins/fp8.py defines it, for whoever builds a bundle: no op, no ONNX Runtime.
#pragma once

#include "plugins/cpu/kernel.h"

namespace glm {

// Rounds rows x [O, I] of float32, bfloat16 or float16 to E4M3 `values` [O, I] with one float32 scale each [O].
// Returns the number of rows done: O, or the index of the first row with an element that is not finite.
size_t quantize_rows_scalar(Type type, const void* x, size_t O, size_t I, uint8_t* values, float* scales);
size_t quantize_rows_avx2(Type type, const void* x, size_t O, size_t I, uint8_t* values, float* scales);
size_t quantize_rows_avx512(Type type, const void* x, size_t O, size_t I, uint8_t* values, float* scales);

}  // namespace glm
