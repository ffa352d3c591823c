// out = sum over k of weight_k y_k, in the order of k, in float32, rounded once.
//
// Grid: 128 threads with four neighbouring columns each; a token's columns are spread over as many blocks as it takes.
#pragma once

#include "plugins/cuda/device.cuh"

namespace glm {

constexpr int kCombineThreads = 128, kCombineColumns = 4 * kCombineThreads;

struct CombineArguments {
  const float* y;               // [T, K, D]
  const int32_t* expert_ids;    // [T, K]
  const float* expert_weights;  // [T, K]
  void* out;                    // [T, D]
  int D, K, experts;
};

template <class X>
__global__ void __launch_bounds__(kCombineThreads) combine_kernel(const CombineArguments a) {
  wait_for_previous_kernel();
  start_next_kernel();
  const int blocks = (a.D + kCombineColumns - 1) / kCombineColumns;
  const size_t token = blockIdx.x / static_cast<unsigned>(blocks);
  const int column = static_cast<int>(blockIdx.x) % blocks * kCombineColumns + static_cast<int>(threadIdx.x) * 4;
  if (column >= a.D) return;
  float sum[4] = {};
#pragma unroll 4
  for (int k = 0; k < a.K; ++k) {
    const size_t assignment = token * static_cast<size_t>(a.K) + static_cast<size_t>(k);
    const int expert = a.expert_ids[assignment];
    // Nobody computed y for an expert that does not exist; the token says so.
    const float weight = 0 <= expert && expert < a.experts ? a.expert_weights[assignment] : float_of(0x7fc00000);
    const uint4 y = *reinterpret_cast<const uint4*>(a.y + assignment * static_cast<size_t>(a.D) + column);
    const unsigned bits[4] = {y.x, y.y, y.z, y.w};
    for (int i = 0; i < 4; ++i) sum[i] += weight * float_of(bits[i]);
  }
  X* out = static_cast<X*>(a.out) + token * static_cast<size_t>(a.D) + column;
  if constexpr (sizeof(X) == 4) {
    *reinterpret_cast<uint4*>(out) = {bits_of(sum[0]), bits_of(sum[1]), bits_of(sum[2]), bits_of(sum[3])};
  } else {
    unsigned bits[4];
    for (int i = 0; i < 4; ++i) bits[i] = round_to<X>(sum[i]).bits;
    *reinterpret_cast<uint2*>(out) = {bits[0] | bits[1] << 16, bits[2] | bits[3] << 16};
  }
}

}  // namespace glm
