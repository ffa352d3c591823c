// The element types that the products multiply, as the tensor cores see them. A step is 32 bytes along the rows: 16
// elements of 16 bits or 32 of E4M3, which lie in a fragment's registers in the same way.
//
// Sums are float32. But the tensor cores that multiply E4M3 keep only some 13 bits of fraction while they add, so that
// such sums have to be short: a kernel moves them into float32 registers every 128 elements (kShortSums).
// exact_mma() multiplies E4M3 numbers as f16, which holds all of them, with the full sums of 16-bit types.
#pragma once

#include "plugins/cuda/device.cuh"

namespace glm {

// Whether mma.sync is worth its short sums; and how many steps of f16 make one of the type.
template <class T>
struct Operand {
  static constexpr bool kShortSums = false;
  static constexpr int kExact = 1;
};
template <>
struct Operand<e4m3> {
  static constexpr bool kShortSums = kHasE4m3Mma;
  static constexpr int kExact = 2;
};

__device__ __forceinline__ void mma_16_bit(bf16, float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  mma_bf16(d, a, b);
}
__device__ __forceinline__ void mma_16_bit(f16, float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  mma_f16(d, a, b);
}

// A step's fragments for exact_mma().
template <class T>
struct Exact {
  unsigned a[Operand<T>::kExact][4];

  __device__ __forceinline__ explicit Exact(const unsigned (&step)[4]) {
    for (int i = 0; i < 4; ++i) {
      if constexpr (Operand<T>::kExact == 1) {
        a[0][i] = step[i];
      } else {
        // The elements of a register become two; which step of 16 an element is in does not matter to the sum as long
        // as both operands agree. Registers 0 and 1 (rows r and r + 8) make the first step, 2 and 3 the second.
        a[i / 2][i % 2] = e4m3x2_to_f16x2(static_cast<uint16_t>(step[i]));
        a[i / 2][i % 2 + 2] = e4m3x2_to_f16x2(static_cast<uint16_t>(step[i] >> 16));
      }
    }
  }
};

template <class T>
__device__ __forceinline__ void exact_mma(float (&d)[4], const Exact<T>& a, const unsigned (&b)[2]) {
  if constexpr (Operand<T>::kExact == 1) {
    mma_16_bit(T{}, d, a.a[0], b);
  } else {
    for (int i = 0; i < 2; ++i) {
      const unsigned wide[2] = {e4m3x2_to_f16x2(static_cast<uint16_t>(b[i])),
                                e4m3x2_to_f16x2(static_cast<uint16_t>(b[i] >> 16))};
      mma_f16(d, a.a[i], wide);
    }
  }
}

}  // namespace glm
