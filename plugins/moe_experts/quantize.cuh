// Rows to E4M3: scale = amax / 448 (1 for a row of zeros), value = x / scale rounded to nearest even. The definition is
// plugins/fp8.py, and the values here are the same, bit for bit.
//
// Grid: one block of 512 threads for every four rows, four warps for each row; a row is read twice, the second time
// from the cache. A NaN in a row becomes the row's scale.
#pragma once

#include "plugins/cuda/device.cuh"

namespace glm {

constexpr int kQuantizeThreads = 512, kQuantizeRows = 4, kQuantizeTeam = kQuantizeThreads / kQuantizeRows;

// Eight neighbours as float32.
template <class X>
__device__ __forceinline__ void load_8(const X* x, float (&value)[8]) {
  if constexpr (sizeof(X) == 4) {
    const uint4* vectors = reinterpret_cast<const uint4*>(x);
    const uint4 low = vectors[0], high = vectors[1];
    const unsigned bits[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
    for (int i = 0; i < 8; ++i) value[i] = float_of(bits[i]);
  } else {
    const uint4 vector = *reinterpret_cast<const uint4*>(x);
    const unsigned bits[4] = {vector.x, vector.y, vector.z, vector.w};
    for (int i = 0; i < 4; ++i) {
      value[2 * i] = to_f32(X{static_cast<uint16_t>(bits[i])});
      value[2 * i + 1] = to_f32(X{static_cast<uint16_t>(bits[i] >> 16)});
    }
  }
}

// The larger one, or NaN where there is one.
__device__ __forceinline__ float larger(float a, float b) { return a > b || a != a ? a : b; }

// Rows 4 block .. 4 block + 3 of x [rows, width]; width is a multiple of 16.
template <class X>
__device__ __forceinline__ void quantize_four_rows(const X* x, e4m3* values, float* scales, int rows, int width,
                                                   int block) {
  const int team = static_cast<int>(threadIdx.x) / kQuantizeTeam, place = static_cast<int>(threadIdx.x) % kQuantizeTeam;
  const int row = block * kQuantizeRows + team;
  const size_t begin = static_cast<size_t>(row) * static_cast<size_t>(width);
  float amax = 0.0f;
  if (row < rows) {
    for (int i = place * 8; i < width; i += kQuantizeTeam * 8) {
      float value[8];
      load_8(x + begin + i, value);
      for (int j = 0; j < 8; ++j) amax = larger(fabsf(value[j]), amax);
    }
  }
  for (int lanes = 16; lanes > 0; lanes /= 2) amax = larger(shuffle_xor(amax, lanes), amax);
  float* of_warps = reinterpret_cast<float*>(shared_memory());
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = amax;
  block_sync();
  if (row >= rows) return;
  for (int warp = 0; warp < kQuantizeTeam / 32; ++warp)
    amax = larger(of_warps[team * (kQuantizeTeam / 32) + warp], amax);
  float scale = amax / 448.0f;
  if (scale == 0.0f) scale = 1.0f;
  for (int i = place * 8; i < width; i += kQuantizeTeam * 8) {
    float value[8];
    load_8(x + begin + i, value);
    unsigned pairs[4];
    for (int j = 0; j < 4; ++j) pairs[j] = round_to_e4m3x2(value[2 * j] / scale, value[2 * j + 1] / scale);
    *reinterpret_cast<uint2*>(values + begin + i) = {pairs[0] | pairs[1] << 16, pairs[2] | pairs[3] << 16};
  }
  if (place == 0) scales[row] = scale;
}

struct QuantizeArguments {
  const void* x;  // [rows, width]
  e4m3* values;   // [rows, width]
  float* scales;  // [rows]
  int rows, width;
};

template <class X>
__global__ void __launch_bounds__(kQuantizeThreads) quantize_kernel(const QuantizeArguments a) {
  start_next_kernel();  // before the wait: `down` has weights to ask for (decode.cuh)
  wait_for_previous_kernel();
  quantize_four_rows(static_cast<const X*>(a.x), a.values, a.scales, a.rows, a.width, static_cast<int>(blockIdx.x));
}

}  // namespace glm
