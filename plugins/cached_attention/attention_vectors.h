// Vectors of any width, on the vector types of GCC and Clang, and how cached elements become vectors of floats.
//
// Each instruction set's file compiles this for itself; everything has internal linkage, so that the linker cannot mix
// them up.
#pragma once

#include "plugins/cpu/rows.h"

#ifdef __F16C__
#include <immintrin.h>
#endif

namespace glm {
namespace {

struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

template <size_t lanes>
struct Vectors {
  typedef float F __attribute__((vector_size(4 * lanes)));
  typedef int32_t I __attribute__((vector_size(4 * lanes)));
  typedef uint32_t U __attribute__((vector_size(4 * lanes)));
};
using Four = Vectors<4>::F;

template <class V>
GLM_INLINE V load(const void* from) {
  V value;
  __builtin_memcpy(&value, from, sizeof value);
  return value;
}
template <class V>
GLM_INLINE void store(void* to, V value) {
  __builtin_memcpy(to, &value, sizeof value);
}
template <class F>
GLM_INLINE F splat(float value) {
  return value - F{};  // unlike adding a zero, this costs nothing: it leaves -0 alone
}
// Elements of a and b, which are numbered on, in the order of the indices.
template <class F, class I>
GLM_INLINE F shuffle(F a, F b, I indices) {
#ifdef __clang__
  constexpr int32_t width = sizeof(F) / 4;
  F result;
  for (int32_t i = 0; i < width; i++) result[i] = indices[i] < width ? a[indices[i]] : b[indices[i] - width];
  return result;
#else
  return __builtin_shuffle(a, b, indices);
#endif
}
// shuffle() within every four lanes, by the indices for the first four; those of b begin at 4.
template <size_t width>
GLM_INLINE typename Vectors<width>::F shuffle_fours(typename Vectors<width>::F a, typename Vectors<width>::F b,
                                                    const int32_t (&indices)[4]) {
  typename Vectors<width>::I all;
  for (size_t i = 0; i < width; i++) {
    const int32_t index = indices[i % 4], first = static_cast<int32_t>(i / 4 * 4);
    all[i] = first + (index < 4 ? index : index - 4 + static_cast<int32_t>(width));
  }
  return shuffle(a, b, all);
}

inline float to_f32(float x) { return x; }
inline float to_f32(Bf16 x) { return bf16_to_f32(x.bits); }
inline float to_f32(F16 x) { return f16_to_f32(x.bits); }

// The largest or the sum of a vector's lanes, in all of them.
template <size_t width, bool largest, size_t step = width / 2>
GLM_INLINE typename Vectors<width>::F across(typename Vectors<width>::F x) {
  if constexpr (step == 0) {
    return x;
  } else {
    typename Vectors<width>::I partner;
    for (size_t i = 0; i < width; i++) partner[i] = static_cast<int32_t>(i ^ step);
    const auto other = shuffle(x, x, partner);
    return across<width, largest, step / 2>(largest ? (other > x ? other : x) : x + other);
  }
}

// How cached elements become vectors of floats. A word is what one lane holds of a key: two bf16 elements, otherwise
// one as float. Of vectors of bf16 pairs, one vector gets the even elements and one the odd ones: that takes no
// shuffle.
// What is prefetched goes to the first cache (kNear 3, as __builtin_prefetch wants it), which waits for fewer lines at
// a time than the second one: too few for floats.
template <class T, size_t width>
struct Elements;

template <size_t width>
struct Elements<float, width> {
  using F = typename Vectors<width>::F;
  static constexpr size_t kPerWord = 1;
  static constexpr int kNear = 2;
  static GLM_INLINE float word(const float* from, size_t) { return *from; }
  template <class V>
  static GLM_INLINE V words(const float* from) {
    return load<V>(from);
  }
  static GLM_INLINE F element(F words, size_t) { return words; }
};

template <size_t width>
struct Elements<F16, width> {
  using F = typename Vectors<width>::F;
  static constexpr size_t kPerWord = 1;
  static constexpr int kNear = 3;
  static GLM_INLINE float word(const F16* from, size_t) { return to_f32(*from); }
  template <class V>
  static GLM_INLINE V words(const F16* from) {
    constexpr size_t count = sizeof(V) / sizeof(float);
    V result = {};
#ifdef __F16C__
    if constexpr (count == 4) return (V)_mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
    if constexpr (count == 8) return (V)_mm256_cvtph_ps(load<__m128i>(from));
#endif
    for (size_t i = 0; i < count; i++) result[i] = to_f32(from[i]);
    return result;
  }
  static GLM_INLINE F element(F words, size_t) { return words; }
};

template <size_t width>
struct Elements<Bf16, width> {
  using F = typename Vectors<width>::F;
  using U = typename Vectors<width>::U;
  static constexpr size_t kPerWord = 2;
  static constexpr int kNear = 3;
  static GLM_INLINE float word(const Bf16* from, size_t left) {
    return float_of(from[0].bits | (left > 1 ? static_cast<uint32_t>(from[1].bits) << 16 : 0));
  }
  template <class V>
  static GLM_INLINE V words(const Bf16* from) {
    return load<V>(from);
  }
  static GLM_INLINE F element(F words, size_t odd) { return odd ? (F)((U)words & 0xffff0000u) : (F)((U)words << 16); }
};

}  // namespace
}  // namespace glm
