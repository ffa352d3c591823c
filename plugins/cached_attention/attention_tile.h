// The inner loops of CachedAttention for any vector width, on the vector types of GCC and Clang.
//
// Each instruction set's file includes this and compiles it for itself; everything has internal linkage, so that the
// linker cannot mix them up.
#pragma once

#include <type_traits>
#include <utility>

#include "plugins/cached_attention/attention.h"

#ifdef __F16C__
#include <immintrin.h>
#endif

namespace glm {
namespace {

#define GLM_INLINE inline __attribute__((always_inline))

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

GLM_INLINE float to_f32(float x) { return x; }
GLM_INLINE float to_f32(Bf16 x) { return bf16_to_f32(x.bits); }
GLM_INLINE float to_f32(F16 x) {
#ifdef __F16C__
  return _cvtsh_ss(x.bits);
#else
  // Scaling by a power of two rebiases the exponent and makes subnormal numbers normal.
  uint32_t bits = (x.bits & 0x7fffu) << 13;
  float value;
  std::memcpy(&value, &bits, 4);
  value *= 0x1p112f;
  std::memcpy(&bits, &value, 4);
  if ((x.bits & 0x7c00u) == 0x7c00u) bits |= 0x7f800000u;
  bits |= (x.bits & 0x8000u) << 16;
  std::memcpy(&value, &bits, 4);
  return value;
#endif
}

GLM_INLINE void from_f32(float value, float* y) { *y = value; }
GLM_INLINE void from_f32(float value, Bf16* y) { y->bits = f32_to_bf16(value); }
GLM_INLINE void from_f32(float value, F16* y) {
#ifdef __F16C__
  y->bits = static_cast<uint16_t>(_cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT));
#else
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  uint32_t sign = (bits >> 16) & 0x8000u;
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) {
    bits = 0x7e00u;
  } else if (bits >= 0x477ff000u) {  // rounds to 2^16 or more
    bits = 0x7c00u;
  } else if (bits < 0x38800000u) {  // below 2^-14: the addition rounds to multiples of 2^-24
    std::memcpy(&value, &bits, 4);
    value += 0.5f;
    std::memcpy(&bits, &value, 4);
    bits -= 0x3f000000u;
  } else {
    bits = (bits + 0xfffu + ((bits >> 13) & 1u) - 0x38000000u) >> 13;
  }
  y->bits = static_cast<uint16_t>(bits | sign);
#endif
}

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

template <class T>
void widen(const void* x, size_t n, float* y) {
  const T* from = static_cast<const T*>(x);
  size_t i = 0;
#ifdef __F16C__
  if constexpr (std::is_same_v<T, F16>) {
    for (; i + 8 <= n; i += 8) _mm256_storeu_ps(y + i, _mm256_cvtph_ps(load<__m128i>(from + i)));
  }
#endif
  for (; i < n; i++) y[i] = to_f32(from[i]);
}

template <class T>
void narrow(const float* x, float factor, size_t n, void* y) {
  T* to = static_cast<T*>(y);
  size_t i = 0;
#ifdef __F16C__
  if constexpr (std::is_same_v<T, F16>) {
    const __m256 factors = _mm256_set1_ps(factor);
    for (; i + 8 <= n; i += 8) {
      __m256 value = _mm256_loadu_ps(x + i) * factors;
      store(to + i, _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
    }
  }
#endif
  for (; i < n; i++) from_f32(x[i] * factor, to + i);
}

template <class T>
void rotate(const void* x, const float* cos, const float* sin, size_t R, size_t A, void* y) {
  const T* low = static_cast<const T*>(x);
  const T* high = low + R;
  T* to = static_cast<T*>(y);
  constexpr size_t kStep = 64;
  float a[kStep], b[kStep], c[kStep];
  for (size_t start = 0; start < R; start += kStep) {
    size_t n = R - start < kStep ? R - start : kStep;
    widen<T>(low + start, n, a);
    widen<T>(high + start, n, b);
    for (size_t i = 0; i < n; i++) {
      c[i] = a[i] * cos[start + i] - b[i] * sin[start + i];
      b[i] = b[i] * cos[start + i] + a[i] * sin[start + i];
    }
    narrow<T>(c, 1.0f, n, to + start);
    narrow<T>(b, 1.0f, n, to + R + start);
  }
  std::memcpy(to + 2 * R, low + 2 * R, (A - 2 * R) * sizeof(T));
}

template <class T, size_t lanes>
void pack(const void* q, size_t rows, size_t A, void* packed) {
  float* to = static_cast<float*>(packed);
  std::memset(packed, 0, A * lanes * sizeof(float));
  for (size_t row = 0; row < rows; row++) {
    const T* from = static_cast<const T*>(q) + row * A;
    for (size_t i = 0; i < A; i++) to[i * lanes + row] = to_f32(from[i]);
  }
}

// Scores of `count` positions for `parts` vectors of lanes: a key's element, once broadcast, serves all parts.
template <size_t width, size_t parts, size_t count>
GLM_INLINE void score_some(const float* packed, const float* keys, size_t A, const char* ahead, float* scores) {
  using F = typename Vectors<width>::F;
  F sum[count][parts] = {};
  for (size_t i = 0; i < A; i++) {
    __builtin_prefetch(ahead + 4 * count * i);  // as far ahead as this has read
    F q[parts];
    for (size_t part = 0; part < parts; part++) q[part] = load<F>(packed + (i * parts + part) * width);
#pragma GCC unroll 16
    for (size_t p = 0; p < count; p++) {
      F k = splat<F>(keys[p * A + i]);
#pragma GCC unroll 2
      for (size_t part = 0; part < parts; part++) sum[p][part] += q[part] * k;
    }
  }
  for (size_t p = 0; p < count; p++) {
    for (size_t part = 0; part < parts; part++) store(scores + (p * parts + part) * width, sum[p][part]);
  }
}

template <size_t width, size_t parts, size_t count>
GLM_INLINE void score_all(const float* q, const float* k, size_t positions, size_t A, const char* ahead,
                          float* scores) {
  constexpr size_t lanes = width * parts;
  size_t p = 0;
  for (; p + count <= positions; p += count) {
    score_some<width, parts, count>(q, k + p * A, A, ahead + p * A * 4, scores + p * lanes);
  }
  for (; p + 4 <= positions; p += 4) score_some<width, parts, 4>(q, k + p * A, A, ahead, scores + p * lanes);
  for (; p < positions; p++) score_some<width, parts, 1>(q, k + p * A, A, ahead, scores + p * lanes);
}

template <size_t width, size_t parts, size_t count>
void score(const void* packed, const void* keys, size_t positions, size_t A, const char* ahead, float* scores) {
  const float* q = static_cast<const float*>(packed);
  const float* k = static_cast<const float*>(keys);
  // With a constant A, a key's address is one register plus a displacement: there are not enough registers otherwise.
  if (A == 128) {
    score_all<width, parts, count>(q, k, positions, 128, ahead, scores);
  } else if (A == 64) {
    score_all<width, parts, count>(q, k, positions, 64, ahead, scores);
  } else {
    score_all<width, parts, count>(q, k, positions, A, ahead, scores);
  }
}

template <size_t width, size_t lanes, bool masked>
GLM_INLINE void softmax_of(float* scores, size_t positions, const int32_t* seen, float factor, float* max, float* sum,
                           float* decay) {
  using F = typename Vectors<width>::F;
  using I = typename Vectors<width>::I;
  using U = typename Vectors<width>::U;
  const I limit = masked ? load<I>(seen) : I{};
  const F old = load<F>(max);
  F top = old;
  for (size_t p = 0; p < positions; p++) {
    F x = load<F>(scores + p * lanes);
    if (masked) x = static_cast<int32_t>(p) < limit ? x : top;
    top = x > top ? x : top;
  }
  F total = {};
  for (size_t p = 0; p < positions; p++) {
    F x = exp2_of<F, U>((load<F>(scores + p * lanes) - top) * factor);
    if (masked) x = static_cast<int32_t>(p) < limit ? x : F{};
    total += x;
    store(scores + p * lanes, x);
  }
  F ratio = exp2_of<F, U>((old - top) * factor);
  store(max, top);
  store(sum, load<F>(sum) * ratio + total);
  store(decay, ratio);
}

template <size_t width, size_t lanes>
void softmax(float* scores, size_t positions, const int32_t* seen, float factor, float* max, float* sum, float* decay) {
  for (size_t i = 0; i < lanes; i += width) {
    if (seen) {
      softmax_of<width, lanes, true>(scores + i, positions, seen + i, factor, max + i, sum + i, decay + i);
    } else {
      softmax_of<width, lanes, false>(scores + i, positions, nullptr, factor, max + i, sum + i, decay + i);
    }
  }
}

// Two vectors of values as floats. Of bf16 pairs, the first gets the even columns and the second the odd ones: that
// takes no shuffle; sums are brought into that order and back once per block.
template <class T, size_t width>
struct Columns;

template <size_t width>
struct Columns<float, width> {
  using F = typename Vectors<width>::F;
  static GLM_INLINE void values(const float* from, F v[2]) {
    v[0] = load<F>(from);
    v[1] = load<F>(from + width);
  }
  static GLM_INLINE void sort(F*) {}
  static GLM_INLINE void unsort(F*) {}
};

template <size_t width>
struct Columns<Bf16, width> {
  using F = typename Vectors<width>::F;
  using I = typename Vectors<width>::I;
  using U = typename Vectors<width>::U;
  static GLM_INLINE void values(const Bf16* from, F v[2]) {
    U pairs = load<U>(from);
    v[0] = (F)(pairs << 16);
    v[1] = (F)(pairs & 0xffff0000u);
  }
  static GLM_INLINE void sort(F* x) {
    I even, odd;
    for (size_t i = 0; i < width; i++) {
      even[i] = static_cast<int32_t>(2 * i);
      odd[i] = static_cast<int32_t>(2 * i + 1);
    }
    F first = shuffle(x[0], x[1], even);
    x[1] = shuffle(x[0], x[1], odd);
    x[0] = first;
  }
  static GLM_INLINE void unsort(F* x) {
    I low, high;
    for (size_t i = 0; i < width; i++) {
      low[i] = static_cast<int32_t>(i / 2 + i % 2 * width);
      high[i] = static_cast<int32_t>(i / 2 + i % 2 * width + width / 2);
    }
    F first = shuffle(x[0], x[1], low);
    x[1] = shuffle(x[0], x[1], high);
    x[0] = first;
  }
};

// `rows` rows of all columns; `stride` lanes between the probabilities of two positions.
template <class T, size_t width, size_t rows>
void accumulate_rows(const float* probabilities, const float* decay, const T* values, size_t stride, size_t positions,
                     size_t A, const char* ahead, float* out) {
  using F = typename Vectors<width>::F;
  using Pair = Columns<T, width>;
  size_t column = 0;
  for (; column + 2 * width <= A; column += 2 * width) {
    F sum[rows][2];
#pragma GCC unroll 16
    for (size_t r = 0; r < rows; r++) {
      sum[r][0] = load<F>(out + r * A + column) * decay[r];
      sum[r][1] = load<F>(out + r * A + column + width) * decay[r];
      Pair::sort(sum[r]);
    }
    const T* value = values + column;
    const float* probability = probabilities;
    for (size_t p = 0; p < positions; p++, value += A, probability += stride) {
      for (size_t line = 0; line < 2 * width * sizeof(T); line += 64, ahead += 64) __builtin_prefetch(ahead);
      F v[2];
      Pair::values(value, v);
#pragma GCC unroll 16
      for (size_t r = 0; r < rows; r++) {
        F weight = splat<F>(probability[r]);
        sum[r][0] += weight * v[0];
        sum[r][1] += weight * v[1];
      }
    }
#pragma GCC unroll 16
    for (size_t r = 0; r < rows; r++) {
      Pair::unsort(sum[r]);
      store(out + r * A + column, sum[r][0]);
      store(out + r * A + column + width, sum[r][1]);
    }
  }
  for (; column < A; column++) {
    for (size_t r = 0; r < rows; r++) {
      float sum = out[r * A + column] * decay[r];
      for (size_t p = 0; p < positions; p++) sum += probabilities[p * stride + r] * to_f32(values[p * A + column]);
      out[r * A + column] = sum;
    }
  }
}

// As few passes over the values as the registers allow: up to `most` rows in one.
template <class T, size_t lanes, size_t width, size_t most>
struct Accumulate {
  using Rows = void (*)(const float*, const float*, const T*, size_t, size_t, size_t, const char*, float*);

  template <size_t... n>
  static Rows pick(size_t rows, std::index_sequence<n...>) {
    static constexpr Rows kRows[] = {accumulate_rows<T, width, n + 1>...};
    return kRows[rows - 1];
  }

  static void all(const float* probabilities, const float* decay, const void* values, size_t rows, size_t positions,
                  size_t A, const char* ahead, float* out) {
    size_t passes = (rows + most - 1) / most;
    for (size_t pass = 0, row = 0; pass < passes; pass++) {
      size_t n = (rows - row + passes - pass - 1) / (passes - pass);
      pick(n, std::make_index_sequence<most>())(probabilities + row, decay + row, static_cast<const T*>(values), lanes,
                                                positions, A, ahead, out + row * A);
      row += n;
    }
  }
};

// The loops with keys as floats: T itself if that is float, otherwise widened. Values are widened, too, unless V is T.
// Per step scores() has parts * count sums in registers, accumulate() up to 2 * most.
template <class T, class V, size_t width, size_t parts, size_t count, size_t most>
constexpr AttentionLoops float_loops() {
  constexpr size_t lanes = width * parts;
  return {lanes,
          !std::is_same_v<T, float>,
          !std::is_same_v<T, V>,
          rotate<T>,
          widen<T>,
          narrow<T>,
          pack<T, lanes>,
          score<width, parts, count>,
          softmax<width, lanes>,
          Accumulate<V, lanes, width, most>::all};
}

}  // namespace
}  // namespace glm
