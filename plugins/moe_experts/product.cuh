// What the kernels of the two products have in common.
//
// Both products go through pairs of weight rows: gate and up of the same column in the first one, two columns of down
// in the second. A kernel computes both dot products of a pair in the same thread, and finish() does the rest: scales,
// SiLU, rounding, where the result belongs.
#pragma once

#include <cmath>

#include "plugins/moe_experts/plan.h"

namespace glm {

struct Product {
  const unsigned char* rows;    // gate_up: [T, D] tokens; down: [A, F] by position; in the type of the weights
  const float* row_scale;       // of each row, E4M3 only
  const unsigned char* weight;  // [E, 2F, D] or [E, D, F]
  const float* weight_scale;    // [E, 2F] or [E, D], E4M3 only
  void* out;                    // gate_up: h [A, F] by position, in out_type; down: y [A, D] by assignment, float32
  const int32_t* order;         // [A]: the assignment at a position
  const Run* runs;
  const int32_t* run_count;
  int row_bytes;  // of an operand's row
  int columns;    // F or D
  int K, tiles, out_type;
};

// The weight row of a pair, counted from the expert's first: `half` 0 or 1 of number `i` among `pairs` pairs of which
// `first` is the first. The row exists where it is below half_end().
template <bool gate_up>
__device__ __forceinline__ int weight_row(const Product& p, int first, int pairs, int half, int i) {
  return gate_up ? half * p.columns + first + i : 2 * first + half * pairs + i;
}
template <bool gate_up>
__device__ __forceinline__ int half_end(const Product& p, int half) {
  return gate_up ? (half + 1) * p.columns : p.columns;
}
template <bool gate_up>
__device__ __forceinline__ int expert_rows(const Product& p) {
  return gate_up ? 2 * p.columns : p.columns;
}

// The operand row at a position.
template <bool gate_up>
__device__ __forceinline__ int operand_row(const Product& p, int position, int assignment) {
  return gate_up ? assignment / p.K : position;
}

__device__ __forceinline__ float silu(float x) { return x / (1.0f + expf(-x)); }

__device__ __forceinline__ void store_rounded(void* out, size_t at, int type, float value) {
  if (type == GLM_CUDA_BF16) {
    static_cast<bf16*>(out)[at] = round_to<bf16>(value);
  } else if (type == GLM_CUDA_F16) {
    static_cast<f16*>(out)[at] = round_to<f16>(value);
  } else {
    static_cast<float*>(out)[at] = value;
  }
}

// Two neighbours, the first at an even place.
__device__ __forceinline__ void store_rounded(void* out, size_t at, int type, float first, float second) {
  if (type == GLM_CUDA_BF16) {
    const unsigned low = round_to<bf16>(first).bits, high = round_to<bf16>(second).bits;
    static_cast<unsigned*>(out)[at / 2] = low | high << 16;
  } else if (type == GLM_CUDA_F16) {
    const unsigned low = round_to<f16>(first).bits, high = round_to<f16>(second).bits;
    static_cast<unsigned*>(out)[at / 2] = low | high << 16;
  } else {
    static_cast<uint2*>(out)[at / 2] = {bits_of(first), bits_of(second)};
  }
}

// What finish_pairs() has to know of a token.
struct TokenOfTile {
  int position, assignment;
  float scale;
};

template <bool gate_up>
__device__ __forceinline__ TokenOfTile token_of_tile(const Product& p, int position) {
  const int assignment = p.order[position];
  return {position, assignment, p.row_scale ? p.row_scale[operand_row<gate_up>(p, position, assignment)] : 1.0f};
}

// Scales of the pairs i and i + 1: of the first rows, then of the second ones.
template <bool gate_up>
__device__ __forceinline__ void pair_scales(const Product& p, int expert, int first, int pairs, int i,
                                            float (&scale)[2][2]) {
  for (int half = 0; half < 2; ++half) {
    const int row = weight_row<gate_up>(p, first, pairs, half, i);
    const bool known = p.weight_scale && row < half_end<gate_up>(p, half);
    const size_t at = static_cast<size_t>(expert) * static_cast<size_t>(expert_rows<gate_up>(p)) + row;
    for (int second = 0; second < 2; ++second) scale[half][second] = known ? p.weight_scale[at + second] : 1.0f;
  }
}

// Stores what the pairs i and i + 1 (i even) of a token make: value[half] for each of them.
template <bool gate_up>
__device__ __forceinline__ void finish_pairs(const Product& p, const TokenOfTile& token, int first, int pairs, int i,
                                             const float (&weight_scale)[2][2], const float (&sum)[2][2]) {
  float value[2][2];
  for (int half = 0; half < 2; ++half) {
    for (int second = 0; second < 2; ++second) {
      value[half][second] = sum[half][second] * (token.scale * weight_scale[half][second]);
    }
  }
  const int column = weight_row<gate_up>(p, first, pairs, 0, i);
  if (gate_up) {
    if (column >= p.columns) return;
    const size_t at = static_cast<size_t>(token.position) * static_cast<size_t>(p.columns) + column;
    store_rounded(p.out, at, p.out_type, silu(value[0][0]) * value[1][0], silu(value[0][1]) * value[1][1]);
  } else {
    const size_t at = static_cast<size_t>(token.assignment) * static_cast<size_t>(p.columns) + column;
    if (column < p.columns) store_rounded(p.out, at, GLM_CUDA_F32, value[0][0], value[0][1]);
    if (column + pairs < p.columns) store_rounded(p.out, at + pairs, GLM_CUDA_F32, value[1][0], value[1][1]);
  }
}

}  // namespace glm
