// The scores of a block: keys, transposed into strips of a few vectors of positions, times a tile's queries.
#pragma once

#include "plugins/cached_attention/attention.h"
#include "plugins/cached_attention/attention_vectors.h"

namespace glm {
namespace {

// Four words of each of `width` / 4 keys, which are four apart, one after the other.
template <class T, size_t width>
GLM_INLINE typename Vectors<width>::F fours(const T* const* keys, size_t element) {
  if constexpr (width == 4) {
    return Elements<T, 4>::template words<Four>(keys[0] + element);
  } else {
    using Half = typename Vectors<width / 2>::F;
    const Half low = fours<T, width / 2>(keys, element), high = fours<T, width / 2>(keys + width / 2, element);
    typename Vectors<width>::F both;
#if defined(__has_builtin) && __has_builtin(__builtin_shufflevector)
    if constexpr (width == 8) both = __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7);
    if constexpr (width == 16) {
      both = __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    }
#else
    for (size_t i = 0; i < width / 2; i++) {
      both[i] = low[i];
      both[width / 2 + i] = high[i];
    }
#endif
    return both;
  }
}

// The words of `width` keys as columns `stride` apart.
template <class T, size_t width>
GLM_INLINE void transpose_vector(const T* const* keys, size_t A, size_t stride, float* to) {
  using F = typename Vectors<width>::F;
  using Element = Elements<T, width>;
  constexpr size_t step = Element::kPerWord;
  size_t element = 0;
  for (; element + 4 * step <= A; element += 4 * step, to += 4 * stride) {
    // Lanes 4 i .. 4 i + 3 of rows[r] are of key 4 i + r; so four by four they are turned in their places.
    F rows[4];
#pragma GCC unroll 4
    for (size_t r = 0; r < 4; r++) rows[r] = fours<T, width>(keys + r, element);
    const F low01 = shuffle_fours<width>(rows[0], rows[1], {0, 4, 1, 5});
    const F high01 = shuffle_fours<width>(rows[0], rows[1], {2, 6, 3, 7});
    const F low23 = shuffle_fours<width>(rows[2], rows[3], {0, 4, 1, 5});
    const F high23 = shuffle_fours<width>(rows[2], rows[3], {2, 6, 3, 7});
    store(to, shuffle_fours<width>(low01, low23, {0, 1, 4, 5}));
    store(to + stride, shuffle_fours<width>(low01, low23, {2, 3, 6, 7}));
    store(to + 2 * stride, shuffle_fours<width>(high01, high23, {0, 1, 4, 5}));
    store(to + 3 * stride, shuffle_fours<width>(high01, high23, {2, 3, 6, 7}));
  }
  for (; element < A; element += step, to += stride) {
    for (size_t i = 0; i < width; i++) to[i] = Element::word(keys[i] + element, A - element);
  }
}

template <class T, size_t width, size_t vectors>
void transpose(const void* keys, size_t positions, size_t A, float* to) {
  const T* key = static_cast<const T*>(keys);
  for (size_t p = 0; p < positions; p += width, key += width * A, to += width) {
    const T* rows[width] = {key};
    // What is beyond the last key may not be read; any number does there.
    for (size_t i = 1; i < width; i++) rows[i] = rows[i - 1] + (p + i < positions ? A : 0);
    transpose_vector<T, width>(rows, A, vectors * width, to);
  }
}

// Scores of a strip for `rows` queries: its vectors, once loaded, serve all of them.
template <class T, size_t width, size_t vectors, size_t rows>
void score_rows(const float* q, const float* keys, size_t words, const char* ahead, size_t bytes, float* scores) {
  using F = typename Vectors<width>::F;
  using Element = Elements<T, width>;
  const size_t step = ceil_div(bytes, words * Element::kPerWord);
  F sum[rows][vectors] = {};
#pragma GCC unroll 2
  for (size_t part = 0; part < Element::kPerWord; part++) {
    const float* key = keys;
    for (size_t word = 0; word < words; word++, key += vectors * width, q += rows) {
      __builtin_prefetch(ahead, 0, Element::kNear);
      ahead += step;
      F factor[vectors];
#pragma GCC unroll 4
      for (size_t v = 0; v < vectors; v++) factor[v] = Element::element(load<F>(key + v * width), part);
#pragma GCC unroll 16
      for (size_t r = 0; r < rows; r++) {
        const F element = splat<F>(q[r]);
#pragma GCC unroll 4
        for (size_t v = 0; v < vectors; v++) sum[r][v] += element * factor[v];
      }
    }
  }
#pragma GCC unroll 16
  for (size_t r = 0; r < rows; r++) {
#pragma GCC unroll 4
    for (size_t v = 0; v < vectors; v++) store(scores + r * kBlock + v * width, sum[r][v]);
  }
}

}  // namespace
}  // namespace glm
