// AVX2 with FMA and F16C. Every weight is widened to float32 and multiplied in float32; a few activation rows meet the
// weights as they stream by, many go through tiles.
#include <cstring>
#include <iterator>

#include "plugins/cpu/gemm_inline.h"
#include "plugins/cpu/tiles_avx2.h"
#include "plugins/cpu/widen_avx2.h"

namespace glm {
namespace {

constexpr size_t kMostFew = 12;                // activation rows; beyond that tiles are faster
constexpr size_t kFirstCacheBytes = 20 << 10;  // of the first cache for activations
constexpr size_t kRowGroup = 8;                // weight rows that share a piece of the activations; a multiple of 4
constexpr size_t kPassBytes = 32 << 10;        // of weights that several passes read
constexpr size_t kLine = 64;
// How far ahead of the rows that are being read weights are called in: into the first cache, if little enough comes
// between for them to still be there when their turn comes, else into the second.
constexpr size_t kNearBytes = 2048, kFarBytes = 6144, kMostBetween = 6144;
// For one activation row, into the second cache and into the first: it takes all that memory has to give, and weights
// are on their way for long.
constexpr size_t kSecondAhead = 8192, kFirstAhead = 512;

template <bool near>
GLM_INLINE void prefetch(const uint8_t* p) {
  _mm_prefetch(reinterpret_cast<const char*>(p), near ? _MM_HINT_T0 : _MM_HINT_T1);
}

// Keeps a vector in a register, which compilers would rather read anew from memory for every use.
template <class Vector>
GLM_INLINE void keep(Vector& v) {
  asm("" : "+x"(v));
}

// The sum of every one of four vectors.
inline __m128 sums_of(const __m256* r) {
  const __m256 sums = _mm256_hadd_ps(_mm256_hadd_ps(r[0], r[1]), _mm256_hadd_ps(r[2], r[3]));
  return _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1));
}

// y = the sum of every one of `count` vectors, of which some more are there if it is no multiple of four.
template <class Widen>
GLM_INLINE void store_sums_of(const __m256* sums, size_t count, float* y) {
  for (size_t i = 0; i < count; i += 4) {
    const __m128 four = _mm_mul_ps(sums_of(sums + i), _mm_set1_ps(Widen::kFactor));
    if (count - i >= 4) {
      _mm_storeu_ps(y + i, four);
    } else {
      std::memcpy(y + i, &four, (count - i) * sizeof(float));
    }
  }
}

// The 32 bytes at `p`, of which `left` belong to the row; beyond them zeros.
inline __m256i load_some(const uint8_t* p, size_t left) {
  if (left >= 32) return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  alignas(32) uint8_t rest[32] = {};
  std::memcpy(rest, p, left);
  return _mm256_load_si256(reinterpret_cast<const __m256i*>(rest));
}

// Vector v of 32 bytes of weights.
template <class Widen, size_t v>
GLM_INLINE __m256 weights(__m256i raw) {
  constexpr size_t kPart = Widen::kVectors / Widen::kParts;
  return Widen::template vector<v % kPart>(Widen::template part<v / kPart>(raw));
}

// The number `turn` of 32 bytes of a weight row, times one activation row.
template <class Widen, size_t v = 0>
GLM_INLINE void multiply_add(__m256i raw, const float* x, size_t turn, __m256 (&sum)[8]) {
  if constexpr (v < Widen::kVectors) {
    __m256& to = sum[(turn * Widen::kVectors + v) % 8];
    to = _mm256_fmadd_ps(weights<Widen, v>(raw), _mm256_load_ps(x + 8 * v), to);
    multiply_add<Widen, v + 1>(raw, x, turn, sum);
  }
}

// The products of `count` elements of a weight row with those of one activation row, in lanes that are yet to be added.
template <class Widen>
GLM_INLINE __m256 dot(const uint8_t* row, const float* x, size_t count) {
  constexpr size_t kGroup = 8 * Widen::kVectors, kTurns = 8 / Widen::kVectors;
  __m256 sum[8];
#pragma GCC unroll 8
  for (size_t i = 0; i < 8; ++i) sum[i] = _mm256_setzero_ps();
  size_t k = 0;
  for (; k + kTurns * kGroup <= count; k += kTurns * kGroup) {
    const uint8_t* p = row + k * Widen::kBytes;
#pragma GCC unroll 8
    for (size_t turn = 0; turn < kTurns; ++turn, p += 32) {
      if (turn % 2 == 0) {
        prefetch<false>(p + kSecondAhead);
        prefetch<true>(p + kFirstAhead);
      }
      const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
      multiply_add<Widen>(raw, x + k + turn * kGroup, turn, sum);
    }
  }
  for (; k < count; k += kGroup) {
    const __m256i raw = load_some(row + k * Widen::kBytes, (count - k) * Widen::kBytes);
    multiply_add<Widen>(raw, x + k, 0, sum);
  }
#pragma GCC unroll 4
  for (size_t i = 0; i < 4; ++i) sum[i] = _mm256_add_ps(sum[i], sum[i + 4]);
  return _mm256_add_ps(_mm256_add_ps(sum[0], sum[2]), _mm256_add_ps(sum[1], sum[3]));
}

// How M activation rows meet weight rows: kRows of them at a time, which share what is read of the activations, with
// kSums sums for every product. The multipliers have eight products under way; sixteen registers hold twelve sums and
// what they are made of.
template <size_t M>
struct Block {
  static constexpr size_t kRows = M == 2 ? 2 : 1;
  static constexpr size_t kSums = M == 3 ? 3 : 2;
};

// Adds the products of 32 bytes of every weight row, which load(row) returns, with M activation rows; `at` is their
// first element in the packed rows, `turn` counts the calls.
template <class Widen, size_t M, size_t turn, size_t v = 0, class Load, size_t R, size_t S>
GLM_INLINE void multiply_add(const Load& load, const float* const* x, size_t at, __m256 (&sum)[R][M][S]) {
  constexpr size_t kPart = Widen::kVectors / Widen::kParts;
  if constexpr (v == Widen::kVectors) {
    return;
  } else if constexpr (M == 2) {  // registers are left for the activations of a part
    __m256 values[kPart][M];
#pragma GCC unroll 4
    for (size_t i = 0; i < kPart * M; ++i) {
      __m256& value = values[i / M][i % M];
      value = _mm256_load_ps(x[i % M] + at + 8 * (v + i / M));
      keep(value);
    }
    constexpr size_t s = (turn * Widen::kParts + v / kPart) % S;
    const auto add = [](__m256 weight, const __m256(&value)[M], __m256(&to)[M][S]) {
#pragma GCC unroll 2
      for (size_t m = 0; m < M; ++m) to[m][s] = _mm256_fmadd_ps(weight, value[m], to[m][s]);
    };
#pragma GCC unroll 4
    for (size_t r = 0; r < R; ++r) {
      __m256i part = Widen::template part<v / kPart>(load(r));
      keep(part);
      add(Widen::template vector<0>(part), values[0], sum[r]);
      if constexpr (kPart == 2) add(Widen::template vector<1>(part), values[1], sum[r]);
    }
    multiply_add<Widen, M, turn, v + kPart>(load, x, at, sum);
  } else {
    const __m256 weight = weights<Widen, v>(load(0));
    constexpr size_t s = (turn * Widen::kVectors + v) % S;
#pragma GCC unroll 8
    for (size_t m = 0; m < M; ++m) {
      sum[0][m][s] = _mm256_fmadd_ps(weight, _mm256_load_ps(x[m] + at + 8 * v), sum[0][m][s]);
    }
    multiply_add<Widen, M, turn, v + 1>(load, x, at, sum);
  }
}

// Adds the products of `count` elements of R weight rows, `row_bytes` apart, with those of M activation rows, element
// `at` of each on, to total[m * kRowGroup + r], vectors whose lanes are yet to be added. As many bytes as are read are
// called in from `ahead` on, in the order of memory.
template <class Widen, size_t M, bool near, size_t R>
GLM_INLINE void dot(const uint8_t* row, size_t row_bytes, const float* const* x, size_t at, size_t count,
                    const uint8_t* ahead, __m256* total) {
  constexpr size_t S = Block<M>::kSums;
  constexpr size_t kGroup = 8 * Widen::kVectors;  // elements in 32 bytes
  __m256 sum[R][M][S];
#pragma GCC unroll 16
  for (size_t i = 0; i < R * M * S; ++i) sum[i / (M * S)][i / S % M][i % S] = _mm256_setzero_ps();
  size_t k = 0;
  for (; k + 2 * kGroup <= count; k += 2 * kGroup) {
#pragma GCC unroll 4
    for (size_t r = 0; r < R; ++r) prefetch<near>(ahead + r * kLine);
    ahead += R * kLine;
    const auto load = [&](size_t r, size_t turn) {
      return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + r * row_bytes + k * Widen::kBytes + 32 * turn));
    };
    multiply_add<Widen, M, 0>([&](size_t r) { return load(r, 0); }, x, at + k, sum);
    multiply_add<Widen, M, 1>([&](size_t r) { return load(r, 1); }, x, at + k + kGroup, sum);
  }
  for (; k < count; k += kGroup) {
    const auto load = [&](size_t r) {
      return load_some(row + r * row_bytes + k * Widen::kBytes, (count - k) * Widen::kBytes);
    };
    multiply_add<Widen, M, 0>(load, x, at + k, sum);
  }
#pragma GCC unroll 4
  for (size_t r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (size_t m = 0; m < M; ++m) {
#pragma GCC unroll 4
      for (size_t s = 1; s < S; ++s) sum[r][m][0] = _mm256_add_ps(sum[r][m][0], sum[r][m][s]);
      __m256& to = total[m * kRowGroup + r];
      to = at == 0 ? sum[r][m][0] : _mm256_add_ps(to, sum[r][m][0]);
    }
  }
}

// Few activation rows: the weights stream by in the order of memory, each is read and widened once. Activations that
// the first cache does not hold are taken in pieces, each for a group of weight rows.
template <class Widen, size_t M, bool near, size_t R = Block<M>::kRows>
void stream(const uint8_t* w, size_t rows, const float* const* x, size_t width, size_t piece, const uint8_t* ahead,
            float* y, size_t stride) {
  const size_t row_bytes = width * Widen::kBytes;
  for (const uint8_t* p = w; p < std::min(ahead, w + rows * row_bytes); p += kLine) prefetch<near>(p);
  __m256 sums[M * kRowGroup] = {};
  for (size_t n = 0; n < rows; n += kRowGroup) {
    const size_t group = std::min(kRowGroup, rows - n);
    for (size_t at = 0; at < width; at += piece) {
      const size_t count = std::min(piece, width - at);
      const uint8_t* row = w + n * row_bytes + at * Widen::kBytes;
      size_t i = 0;
      for (; i + R <= group; i += R) {
        dot<Widen, M, near, R>(row + i * row_bytes, row_bytes, x, at, count, ahead, sums + i);
        ahead += R * count * Widen::kBytes;
      }
      for (; R > 1 && i < group; ++i) {
        dot<Widen, M, near, 1>(row + i * row_bytes, row_bytes, x, at, count, ahead, sums + i);
        ahead += count * Widen::kBytes;
      }
    }
    for (size_t m = 0; m < M; ++m) {
      store_sums_of<Widen>(sums + m * kRowGroup, group, y + m * stride + n);
    }
  }
}

// One activation row meets weight rows one by one: where memory is all that is waited for, it has to be read in order.
template <class Widen>
void multiply_one(const uint8_t* w, size_t rows, const float* const* activations, size_t width, float* y, size_t) {
  constexpr size_t kPiece = kFirstCacheBytes / sizeof(float) / 64 * 64;
  const float* x = *activations;
  __m256 sums[kRowGroup] = {};
  for (size_t n = 0; n < rows; n += kRowGroup) {
    const size_t group = std::min(kRowGroup, rows - n);
    for (size_t at = 0; at < width; at += kPiece) {
      const size_t count = std::min(kPiece, width - at);
      for (size_t i = 0; i < group; ++i) {
        const __m256 part = dot<Widen>(w + ((n + i) * width + at) * Widen::kBytes, x + at, count);
        sums[i] = at == 0 ? part : _mm256_add_ps(sums[i], part);
      }
    }
    store_sums_of<Widen>(sums, group, y + n);
  }
}

// Weights are called in so far ahead that all rows of a group, of which only a piece is read before the next row's,
// arrive in time. Where memory is slower than the arithmetic, lines on their way to the first cache take the slots of
// those that are read.
template <class Widen, size_t M>
void multiply_rows(const uint8_t* w, size_t rows, const float* const* x, size_t width, float* y, size_t stride) {
  constexpr size_t kPiece = kFirstCacheBytes / sizeof(float) / M / 64 * 64;
  const size_t between = (kPiece < width ? kRowGroup : Block<M>::kRows) * width * Widen::kBytes;
  if (Widen::kBytes == 1 && between <= kMostBetween) {
    stream<Widen, M, true>(w, rows, x, width, kPiece, w + between + kNearBytes, y, stride);
  } else {
    stream<Widen, M, false>(w, rows, x, width, kPiece, w + between + kFarBytes, y, stride);
  }
}

// More activation rows than there are registers for sums meet weight rows that stay in a cache some after the others.
template <class Widen>
void multiply_few(const uint8_t* w, size_t rows, const void* const* activations, size_t count, size_t width, float* y,
                  size_t stride) {
  using Rows = void (*)(const uint8_t*, size_t, const float* const*, size_t, float*, size_t);
  static constexpr Rows kRows[] = {multiply_one<Widen>,     multiply_rows<Widen, 2>, multiply_rows<Widen, 3>,
                                   multiply_rows<Widen, 4>, multiply_rows<Widen, 5>, multiply_rows<Widen, 6>};
  constexpr size_t kMost = std::size(kRows);
  const float* x[kMostFew];
  for (size_t m = 0; m < count; ++m) x[m] = static_cast<const float*>(activations[m]);
  const size_t passes = ceil_div(count, kMost), most = ceil_div(count, passes);
  const size_t row_bytes = width * Widen::kBytes;
  const size_t block = passes == 1 ? rows : (kPassBytes / (kRowGroup * row_bytes + 1) + 1) * kRowGroup;
  for (size_t n = 0; n < rows; n += block) {
    for (size_t m = 0; m < count; m += most) {
      kRows[std::min(most, count - m) - 1](w + n * row_bytes, std::min(block, rows - n), x + m, width,
                                           y + m * stride + n, stride);
    }
  }
}

// A weight row, widened: `count` elements of it from element k on, which is the first of a group, are written to
// `wide` with zeros up to the group's end.
template <class Widen, size_t v = 0>
inline void store_wide(__m256i raw, float* wide) {
  if constexpr (v < Widen::kVectors) {
    _mm256_store_ps(wide + 8 * v, weights<Widen, v>(raw));
    store_wide<Widen, v + 1>(raw, wide);
  }
}

template <class Widen>
void widen_row(const uint8_t* row, size_t k, size_t count, float* wide) {
  constexpr size_t kGroup = 8 * Widen::kVectors;
  const uint8_t* p = row + k * Widen::kBytes;
  for (size_t i = 0; i < count; i += kGroup) {
    if (i * Widen::kBytes % kLine == 0) prefetch<false>(p + i * Widen::kBytes + kFarBytes);
    store_wide<Widen>(load_some(p + i * Widen::kBytes, (count - i) * Widen::kBytes), wide + i);
  }
}

template <class Widen>
size_t padded(size_t width) {
  constexpr size_t kGroup = 8 * Widen::kVectors;
  return round_up(width, kGroup);
}

template <class Widen>
void multiply_as(const uint8_t* w, size_t rows, const void* const* x, size_t count, size_t width, float* y,
                 size_t stride) {
  if (count == 0) return;
  if (count <= kMostFew) return multiply_few<Widen>(w, rows, x, count, width, y, stride);
  const auto widen = [&](size_t n, size_t k, size_t length, float* wide) {
    widen_row<Widen>(w + n * width * Widen::kBytes, k, std::min(length, width - k), wide);
  };
  multiply_tiles(widen, rows, x, count, padded<Widen>(width), Widen::kFactor, y, stride);
}

// 32 bytes' worth of activations in the order of Widen::vector.
template <class Widen>
GLM_INLINE void reorder(const float* x, float* packed) {
  constexpr size_t N = Widen::kVectors;
  __m256 r[N];
#pragma GCC unroll 4
  for (size_t i = 0; i < N; ++i) r[i] = _mm256_mul_ps(_mm256_loadu_ps(x + 8 * i), _mm256_set1_ps(Widen::kScale));
  if constexpr (Widen::kLane == 2) {
    const auto halves = [](__m256 v) { return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(v), 0xd8)); };
    const __m256 even = halves(_mm256_shuffle_ps(r[0], r[1], 0x88));
    r[1] = halves(_mm256_shuffle_ps(r[0], r[1], 0xdd));
    r[0] = even;
  } else if constexpr (Widen::kLane == 4) {
    // Groups of four elements as rows, 0 .. 3 in the low halves and 4 .. 7 in the high ones; then columns.
    const __m256 row[4] = {_mm256_permute2f128_ps(r[0], r[2], 0x20), _mm256_permute2f128_ps(r[0], r[2], 0x31),
                           _mm256_permute2f128_ps(r[1], r[3], 0x20), _mm256_permute2f128_ps(r[1], r[3], 0x31)};
    const __m256 low[2] = {_mm256_unpacklo_ps(row[0], row[1]), _mm256_unpacklo_ps(row[2], row[3])};
    const __m256 high[2] = {_mm256_unpackhi_ps(row[0], row[1]), _mm256_unpackhi_ps(row[2], row[3])};
    r[0] = _mm256_shuffle_ps(low[0], low[1], 0x44);
    r[1] = _mm256_shuffle_ps(high[0], high[1], 0x44);
    r[2] = _mm256_shuffle_ps(low[0], low[1], 0xee);
    r[3] = _mm256_shuffle_ps(high[0], high[1], 0xee);
  }
#pragma GCC unroll 4
  for (size_t i = 0; i < N; ++i) _mm256_store_ps(packed + 8 * i, r[i]);
}

template <class Widen>
void pack_as(const float* x, size_t width, float* packed) {
  constexpr size_t kGroup = 8 * Widen::kVectors;
  size_t i = 0;
  for (; i + kGroup <= width; i += kGroup) reorder<Widen>(x + i, packed + i);
  if (i == width) return;
  float rest[kGroup] = {};
  std::copy(x + i, x + width, rest);
  reorder<Widen>(rest, packed + i);
}

// Calls f with the widener of a form.
template <class F>
auto with_widener(Form form, const F& f) {
  switch (form) {
    case Form::f32_bf16:
    case Form::bf16_bf16:
      return f(WidenBf16());
    case Form::f32_f16:
      return f(WidenF16());
    case Form::bf16_e4m3:
      return f(WidenE4m3());
    case Form::f32_f32:
      break;
  }
  return f(WidenF32());
}

size_t packed_bytes(Form form, size_t width) {
  return with_widener(form, [&](auto widen) { return whole_lines(padded<decltype(widen)>(width) * 4); });
}

void pack(Form form, const float* x, size_t width, void* packed) {
  with_widener(form, [&](auto widen) { pack_as<decltype(widen)>(x, width, static_cast<float*>(packed)); });
}

void multiply(Form form, const void* weights, size_t rows, const void* const* activations, size_t count, size_t width,
              float* y, size_t stride) {
  const auto* w = static_cast<const uint8_t*>(weights);
  with_widener(form, [&](auto widen) { multiply_as<decltype(widen)>(w, rows, activations, count, width, y, stride); });
}

}  // namespace

const Gemm kGemmAvx2 = {packed_bytes, pack, multiply, quantize_row, silu_mul};

}  // namespace glm
