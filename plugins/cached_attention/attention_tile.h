// The inner loops of CachedAttention for any vector width.
//
// To add an instruction set: a file attention_<isa>.cpp that hands out attention_loops() with its number of lanes (a
// power of two, from 4) and with the rows of a tile and the vectors of a strip that its registers hold: a sum for each
// row and vector, the vectors, and an operand of a row. Of the 16 of AVX2 that are 4 * 3 + 3 + 1 or 6 * 2 + 2 + 1. Both
// have twelve sums, so that none waits for its last product; the first has no idle registers with eight query heads
// for each key/value head, the second reads values in whole lines, which floats need.
#pragma once

#include <limits>
#include <utility>

#include "plugins/cached_attention/attention.h"
#include "plugins/cached_attention/attention_scores.h"
#include "plugins/cached_attention/attention_vectors.h"

namespace glm {
namespace {

inline void widen(Type type, const void* x, size_t n, float* y) {
  const float* from = load_f32(type, x, 0, n, y);
  if (from != y) std::memcpy(y, from, n * sizeof(float));
}

inline void narrow(Type type, const float* x, size_t n, void* y) { store_f32(type, x, 0, n, y); }

inline void round(Type type, float* x, size_t n) {
  if (type == Type::bf16) {
    for (size_t i = 0; i < n; i++) x[i] = bf16_to_f32(f32_to_bf16(x[i]));
  } else if (type == Type::f16) {
    for (size_t i = 0; i < n; i++) x[i] = f16_to_f32(f32_to_f16(x[i]));
  }
}

inline void rotate(const float* cos, const float* sin, size_t R, float* x) {
  for (size_t i = 0; i < R; i++) {
    const float low = x[i], high = x[R + i];
    x[i] = low * cos[i] - high * sin[i];
    x[R + i] = high * cos[i] + low * sin[i];
  }
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

// Two passes, each over all rows, whose steps do not wait for one another.
template <size_t width, size_t vectors>
void softmax(float* scores, const int32_t* seen, size_t rows, size_t positions, float* max, float* sum, float* decay) {
  using F = typename Vectors<width>::F;
  using U = typename Vectors<width>::U;
  constexpr size_t strip = vectors * width;
  const auto end = [&](size_t row) { return seen ? static_cast<size_t>(seen[row]) : positions; };
  for (size_t row = 0; row < rows; row++) {
    float* x = scores + row * kBlock;
    const size_t whole = round_up(end(row), strip);
    for (size_t p = end(row); p < whole; p++) x[p] = -std::numeric_limits<float>::infinity();
    F top[vectors];
    for (F& each : top) each = splat<F>(max[row]);
    for (size_t p = 0; p < whole; p += strip) {
#pragma GCC unroll 4
      for (size_t v = 0; v < vectors; v++) {
        const F value = load<F>(x + p + v * width);
        top[v] = value > top[v] ? value : top[v];
      }
    }
    for (const F& each : top) top[0] = each > top[0] ? each : top[0];
    const float largest = across<width, true>(top[0])[0];
    decay[row] = max[row] - largest;
    max[row] = largest;
  }
  for (size_t row = 0; row < rows; row++) {
    float* x = scores + row * kBlock;
    const size_t whole = round_up(end(row), strip);
    const F largest = splat<F>(max[row]);
    const F ratio = exp2_of<F, U>(splat<F>(decay[row]));
    decay[row] = ratio[0];
    F total = load<F>(sum + row * width) * ratio;
    for (size_t p = 0; p < whole; p += width) {
      const F value = exp2_of<F, U>(load<F>(x + p) - largest);
      total += value;
      store(x + p, value);
    }
    for (size_t p = whole; p < positions; p += width) store(x + p, F{});
    store(sum + row * width, total);
  }
}

// `rows` rows of the columns of `count` vectors of words; of each word the elements from `part`, `parts` of them.
template <class T, size_t width, size_t rows, size_t count, size_t part, size_t parts>
GLM_INLINE void accumulate_columns(const float* probabilities, const float* decay, const T* values, size_t positions,
                                   size_t A, const char*& ahead, size_t step, float* out) {
  using F = typename Vectors<width>::F;
  using Element = Elements<T, width>;
  constexpr size_t vectors = count * parts;
  const auto column = [](size_t v) { return (v / parts * Element::kPerWord + part + v % parts) * width; };
  F sum[rows][vectors];
#pragma GCC unroll 16
  for (size_t r = 0; r < rows; r++) {
#pragma GCC unroll 4
    for (size_t v = 0; v < vectors; v++) sum[r][v] = load<F>(out + r * A + column(v)) * decay[r];
  }
  for (size_t p = 0; p < positions; p++, values += A) {
    __builtin_prefetch(ahead, 0, Element::kNear);
    ahead += step;
    F value[vectors];
#pragma GCC unroll 4
    for (size_t v = 0; v < vectors; v++) {
      const F words = Element::template words<F>(values + v / parts * Element::kPerWord * width);
      value[v] = Element::element(words, part + v % parts);
    }
#pragma GCC unroll 16
    for (size_t r = 0; r < rows; r++) {
      const F weight = splat<F>(probabilities[r * kBlock + p]);
#pragma GCC unroll 4
      for (size_t v = 0; v < vectors; v++) sum[r][v] += weight * value[v];
    }
  }
#pragma GCC unroll 16
  for (size_t r = 0; r < rows; r++) {
#pragma GCC unroll 4
    for (size_t v = 0; v < vectors; v++) store(out + r * A + column(v), sum[r][v]);
  }
}

// `rows` rows of all columns: as many vectors of words at a time as there may be sums, of words of two elements first
// the even and then the odd ones; in the end two vectors of floats at a time.
template <class T, size_t width, size_t vectors, size_t rows>
void accumulate_rows(const float* probabilities, const float* decay, const T* values, size_t positions, size_t A,
                     const char* ahead, size_t bytes, float* out) {
  constexpr size_t per_word = Elements<T, width>::kPerWord, columns = per_word * width, pair = 2 / per_word;
  const size_t all = A / columns, whole = vectors > per_word ? all / vectors * vectors : 0;
  const size_t passes = whole / vectors * per_word + ceil_div(all - whole, pair);
  const size_t step = passes ? ceil_div(bytes, passes * positions) : 0;
  size_t column = 0;
  for (; column < whole * columns; column += vectors * columns) {
    accumulate_columns<T, width, rows, vectors, 0, 1>(probabilities, decay, values + column, positions, A, ahead, step,
                                                      out + column);
    if constexpr (per_word == 2) {
      accumulate_columns<T, width, rows, vectors, 1, 1>(probabilities, decay, values + column, positions, A, ahead,
                                                        step, out + column);
    }
  }
  for (; column + pair * columns <= A; column += pair * columns) {
    accumulate_columns<T, width, rows, pair, 0, per_word>(probabilities, decay, values + column, positions, A, ahead,
                                                          step, out + column);
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

// The loops for caches of T with vectors of `width` floats, at most `most` rows in a tile and `vectors` in a strip.
template <class T, size_t width, size_t most, size_t vectors>
struct Loops {
  static_assert(kBlock % (vectors * width) == 0, "a block is whole strips");
  using Score = void (*)(const float*, const float*, size_t, const char*, size_t, float*);
  using Accumulate = void (*)(const float*, const float*, const T*, size_t, size_t, const char*, size_t, float*);

  template <size_t... n>
  static Score score_of(size_t rows, std::index_sequence<n...>) {
    static constexpr Score kRows[] = {score_rows<T, width, vectors, n + 1>...};
    return kRows[rows - 1];
  }
  template <size_t... n>
  static Accumulate accumulate_of(size_t rows, std::index_sequence<n...>) {
    static constexpr Accumulate kRows[] = {accumulate_rows<T, width, vectors, n + 1>...};
    return kRows[rows - 1];
  }

  static void scores(const float* q, const float* keys, size_t rows, size_t words, const char* ahead, size_t bytes,
                     float* scores) {
    score_of(rows, std::make_index_sequence<most>())(q, keys, words, ahead, bytes, scores);
  }

  static void accumulate(const float* probabilities, const float* decay, const void* values, size_t rows,
                         size_t positions, size_t A, const char* ahead, size_t bytes, float* out) {
    const auto accumulate = accumulate_of(rows, std::make_index_sequence<most>());
    accumulate(probabilities, decay, static_cast<const T*>(values), positions, A, ahead, bytes, out);
  }
};

template <class T, size_t width, size_t most, size_t vectors>
constexpr AttentionLoops attention_loops() {
  using All = Loops<T, width, most, vectors>;
  return {width,
          most,
          vectors * width,
          Elements<T, width>::kPerWord,
          widen,
          rotate,
          round,
          narrow,
          transpose<T, width, vectors>,
          All::scores,
          softmax<width, vectors>,
          All::accumulate,
          finish<T, width>};
}

}  // namespace
}  // namespace glm
