// The inner loops of CachedAttention for any vector width, on the vector types of GCC and Clang.
//
// Each instruction set's file includes this and compiles it for itself; everything has internal linkage, so that the
// linker cannot mix them up. To add an instruction set: a file attention_<isa>.cpp that hands out attention_loops()
// with its number of lanes (a power of two, from 4) and with as many rows as its registers hold sums of, two vectors
// per row, beside three vectors of operands: (16 - 3) / 2 = 6 with AVX2, (32 - 3) / 2 = 14 with AVX-512.
#pragma once

#include <utility>

#include "plugins/cached_attention/attention.h"
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

// 2^x for x <= 0: within 1.1 ulp (polynomial 2^-28.9, evaluation the rest), exactly 1 at 0, 0 below -126. NaN stays.
template <class F, class U>
GLM_INLINE F exp2_of(F x) {
  const F magic = splat<F>(0x1.8p23f);  // adding it rounds to an integer and leaves that in the low bits
  F shifted = x + magic;
  F r = x - (shifted - magic);
  F p = splat<F>(0x1.41fbb6p-13f);
  p = p * r + 0x1.5f3e56p-10f;
  p = p * r + 0x1.3b2d4ep-7f;
  p = p * r + 0x1.c6aee8p-5f;
  p = p * r + 0x1.ebfbdcp-3f;
  p = p * r + 0x1.62e430p-1f;
  p = p * r + 1.0f;
  F power = (F)(((U)shifted << 23) + (127u << 23));
  return x < -126.0f ? F{} : p * power;
}

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

inline void widen(Type type, const void* x, size_t n, float* y) {
  const float* from = load_f32(type, x, 0, n, y);
  if (from != y) std::memcpy(y, from, n * sizeof(float));
}

inline void narrow(Type type, const float* x, size_t n, void* y) { store_f32(type, x, 0, n, y); }

inline void rotate(const float* cos, const float* sin, size_t R, float* x) {
  for (size_t i = 0; i < R; i++) {
    const float low = x[i], high = x[R + i];
    x[i] = low * cos[i] - high * sin[i];
    x[R + i] = high * cos[i] + low * sin[i];
  }
}

// How cached elements become vectors of floats. A word is what one lane holds of a key: two bf16 elements, otherwise
// one as float. Of vectors of bf16 pairs, one vector gets the even elements and one the odd ones: that takes no
// shuffle.
template <class T, size_t width>
struct Elements;

template <size_t width>
struct Elements<float, width> {
  using F = typename Vectors<width>::F;
  static constexpr size_t kPerWord = 1;
  static GLM_INLINE float word(const float* from, size_t) { return *from; }
  static GLM_INLINE Four words(const float* from) { return load<Four>(from); }
  static GLM_INLINE F element(F words, size_t) { return words; }
  static GLM_INLINE void columns(const float* from, F v[2]) {
    v[0] = load<F>(from);
    v[1] = load<F>(from + width);
  }
};

template <size_t width>
struct Elements<F16, width> {
  using F = typename Vectors<width>::F;
  static constexpr size_t kPerWord = 1;
  template <class V>
  static GLM_INLINE V widened(const F16* from) {
    constexpr size_t count = sizeof(V) / sizeof(float);
    V result = {};
#ifdef __F16C__
    if constexpr (count == 4) return (V)_mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
    if constexpr (count == 8) return (V)_mm256_cvtph_ps(load<__m128i>(from));
#endif
    for (size_t i = 0; i < count; i++) result[i] = to_f32(from[i]);
    return result;
  }
  static GLM_INLINE float word(const F16* from, size_t) { return to_f32(*from); }
  static GLM_INLINE Four words(const F16* from) { return widened<Four>(from); }
  static GLM_INLINE F element(F words, size_t) { return words; }
  static GLM_INLINE void columns(const F16* from, F v[2]) {
    v[0] = widened<F>(from);
    v[1] = widened<F>(from + width);
  }
};

template <size_t width>
struct Elements<Bf16, width> {
  using F = typename Vectors<width>::F;
  using U = typename Vectors<width>::U;
  static constexpr size_t kPerWord = 2;
  static GLM_INLINE float word(const Bf16* from, size_t left) {
    return float_of(from[0].bits | (left > 1 ? static_cast<uint32_t>(from[1].bits) << 16 : 0));
  }
  static GLM_INLINE Four words(const Bf16* from) { return load<Four>(from); }
  static GLM_INLINE F element(F words, size_t odd) { return odd ? (F)((U)words & 0xffff0000u) : (F)((U)words << 16); }
  static GLM_INLINE void columns(const Bf16* from, F v[2]) {
    const F pairs = load<F>(from);
    v[0] = element(pairs, 0);
    v[1] = element(pairs, 1);
  }
};

// Four words of each of `width` / 4 keys, which are four apart, one after the other.
template <class T, size_t width>
GLM_INLINE typename Vectors<width>::F fours(const T* const* keys, size_t element) {
  if constexpr (width == 4) {
    return Elements<T, 4>::words(keys[0] + element);
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

template <class T, size_t width>
void transpose(const void* keys, size_t positions, size_t A, float* to) {
  constexpr size_t per_word = Elements<T, width>::kPerWord;
  const size_t words = (A + per_word - 1) / per_word;
  for (size_t p = 0; p < positions; p += width) {
    const T* rows[width];
    for (size_t i = 0; i < width; i++) {
      // What is beyond the last key may not be read; any number does there.
      rows[i] = static_cast<const T*>(keys) + (p + i < positions ? p + i : positions - 1) * A;
    }
    transpose_vector<T, width>(rows, A, 2 * width, to + p / width % 2 * width);
    if (p / width % 2) to += words * 2 * width;
  }
}

// Scores of all positions for `rows` queries: a key's vector, once loaded, serves all of them.
template <class T, size_t width, size_t rows>
void score_rows(const float* q, const float* keys, size_t positions, size_t words, const char* ahead, size_t step,
                float* scores) {
  using F = typename Vectors<width>::F;
  using Element = Elements<T, width>;
  for (size_t p = 0; p < positions; p += 2 * width) {
    F sum[rows][2] = {};
    const float* query = q;
#pragma GCC unroll 2
    for (size_t part = 0; part < Element::kPerWord; part++) {
      const float* key = keys;
      for (size_t word = 0; word < words; word++, key += 2 * width, query += rows) {
        __builtin_prefetch(ahead, 0, 2);
        ahead += step;
        const F low = Element::element(load<F>(key), part), high = Element::element(load<F>(key + width), part);
#pragma GCC unroll 16
        for (size_t r = 0; r < rows; r++) {
          const F factor = splat<F>(query[r]);
          sum[r][0] += factor * low;
          sum[r][1] += factor * high;
        }
      }
    }
    keys += words * 2 * width;
#pragma GCC unroll 16
    for (size_t r = 0; r < rows; r++) {
      store(scores + r * kBlock + p, sum[r][0]);
      store(scores + r * kBlock + p + width, sum[r][1]);
    }
  }
}

// Three passes, each over all rows, whose steps do not wait for one another.
template <size_t width, size_t most>
void softmax(float* scores, const int32_t* seen, size_t rows, size_t positions, float factor, float* max, float* sum,
             float* decay) {
  using F = typename Vectors<width>::F;
  using I = typename Vectors<width>::I;
  using U = typename Vectors<width>::U;
  I lane;
  for (size_t i = 0; i < width; i++) lane[i] = static_cast<int32_t>(i);
  float old[(most + width - 1) / width * width] = {}, top[(most + width - 1) / width * width] = {};
  for (size_t row = 0; row < rows; row++) {
    const float* x = scores + row * kBlock;
    const size_t end = seen ? static_cast<size_t>(seen[row]) : positions;
    old[row] = max[row];
    F largest = splat<F>(max[row]);
    size_t p = 0;
    for (; p + width <= end; p += width) {
      const F value = load<F>(x + p);
      largest = value > largest ? value : largest;
    }
    if (p < end) {
      const F value = load<F>(x + p);
      largest = (lane < static_cast<int32_t>(end - p)) & (value > largest) ? value : largest;
    }
    max[row] = top[row] = across<width, true>(largest)[0];
  }
  for (size_t row = 0; row < rows; row += width) {
    const F ratio = exp2_of<F, U>((load<F>(old + row) - load<F>(top + row)) * factor);
    std::memcpy(decay + row, &ratio, std::min(width, rows - row) * sizeof(float));
  }
  for (size_t row = 0; row < rows; row++) {
    float* x = scores + row * kBlock;
    const size_t end = seen ? static_cast<size_t>(seen[row]) : positions;
    const F largest = splat<F>(max[row]);
    F total = load<F>(sum + row * width) * decay[row];
    size_t p = 0;
    for (; p + width <= end; p += width) {
      const F value = exp2_of<F, U>((load<F>(x + p) - largest) * factor);
      total += value;
      store(x + p, value);
    }
    if (p < end) {
      const F value = exp2_of<F, U>((load<F>(x + p) - largest) * factor);
      const F masked = lane < static_cast<int32_t>(end - p) ? value : F{};
      total += masked;
      store(x + p, masked);
      p += width;
    }
    for (; p < positions; p += width) store(x + p, F{});
    store(sum + row * width, total);
  }
}

// `rows` rows of all columns.
template <class T, size_t width, size_t rows>
void accumulate_rows(const float* probabilities, const float* decay, const T* values, size_t positions, size_t A,
                     const char* ahead, size_t step, float* out) {
  using F = typename Vectors<width>::F;
  size_t column = 0;
  for (; column + 2 * width <= A; column += 2 * width) {
    F sum[rows][2];
#pragma GCC unroll 16
    for (size_t r = 0; r < rows; r++) {
      sum[r][0] = load<F>(out + r * A + column) * decay[r];
      sum[r][1] = load<F>(out + r * A + column + width) * decay[r];
    }
    const T* value = values + column;
    for (size_t p = 0; p < positions; p++, value += A) {
      __builtin_prefetch(ahead, 0, 2);
      ahead += step;
      F v[2];
      Elements<T, width>::columns(value, v);
#pragma GCC unroll 16
      for (size_t r = 0; r < rows; r++) {
        const F weight = splat<F>(probabilities[r * kBlock + p]);
        sum[r][0] += weight * v[0];
        sum[r][1] += weight * v[1];
      }
    }
#pragma GCC unroll 16
    for (size_t r = 0; r < rows; r++) {
      store(out + r * A + column, sum[r][0]);
      store(out + r * A + column + width, sum[r][1]);
    }
  }
  for (; column < A; column++) {
    for (size_t r = 0; r < rows; r++) {
      float sum = out[r * A + column] * decay[r];
      for (size_t p = 0; p < positions; p++) sum += probabilities[r * kBlock + p] * to_f32(values[p * A + column]);
      out[r * A + column] = sum;
    }
  }
}

template <class T, size_t width>
void finish(const float* sums, const float* sum, size_t A, float* out) {
  using F = typename Vectors<width>::F;
  const float factor = 1.0f / across<width, false>(load<F>(sum))[0];
  size_t column = 0;
  for (; Elements<T, width>::kPerWord == 2 && column + 2 * width <= A; column += 2 * width) {
    for (size_t i = 0; i < 2 * width; i++) out[column + i] = sums[column + i / 2 + i % 2 * width] * factor;
  }
  for (; column < A; column++) out[column] = sums[column] * factor;
}

// The loops for caches of T with vectors of `width` floats and at most `most` rows in a tile.
template <class T, size_t width, size_t most>
struct Loops {
  using Score = void (*)(const float*, const float*, size_t, size_t, const char*, size_t, float*);
  using Accumulate = void (*)(const float*, const float*, const T*, size_t, size_t, const char*, size_t, float*);

  template <size_t... n>
  static Score score_of(size_t rows, std::index_sequence<n...>) {
    static constexpr Score kRows[] = {score_rows<T, width, n + 1>...};
    return kRows[rows - 1];
  }
  template <size_t... n>
  static Accumulate accumulate_of(size_t rows, std::index_sequence<n...>) {
    static constexpr Accumulate kRows[] = {accumulate_rows<T, width, n + 1>...};
    return kRows[rows - 1];
  }

  static void scores(const float* q, const float* keys, size_t rows, size_t positions, size_t words, const char* ahead,
                     size_t step, float* scores) {
    score_of(rows, std::make_index_sequence<most>())(q, keys, positions, words, ahead, step, scores);
  }

  static void accumulate(const float* probabilities, const float* decay, const void* values, size_t rows,
                         size_t positions, size_t A, const char* ahead, size_t step, float* out) {
    const auto accumulate = accumulate_of(rows, std::make_index_sequence<most>());
    accumulate(probabilities, decay, static_cast<const T*>(values), positions, A, ahead, step, out);
  }
};

template <class T, size_t width, size_t most>
constexpr AttentionLoops attention_loops() {
  using All = Loops<T, width, most>;
  return {width,
          most,
          Elements<T, width>::kPerWord,
          widen,
          rotate,
          narrow,
          transpose<T, width>,
          All::scores,
          softmax<width, most>,
          All::accumulate,
          finish<T, width>};
}

}  // namespace
}  // namespace glm
