// AVX2 with FMA and F16C. Every weight is widened to float32 and multiplied in float32; a few activation rows meet the
// weights as they stream by, many go through tiles.
#include <cstring>

#include "plugins/cpu/gemm_inline.h"
#include "plugins/cpu/tiles_avx2.h"
#include "plugins/cpu/widen_avx2.h"

namespace glm {
namespace {

constexpr size_t kMostFew = 8;                 // beyond that tiles are faster
constexpr size_t kFirstCacheBytes = 20 << 10;  // of the first cache for activations
constexpr size_t kRowGroup = 8;                // weight rows whose sums are added across lanes together
// A stream of weights is called into the second cache well ahead, as there are few slots for lines on their way to the
// first, and into the first shortly before its turn.
constexpr size_t kFarBytes = 8192, kNearBytes = 512;

GLM_INLINE void prefetch(const uint8_t* p) {
  _mm_prefetch(reinterpret_cast<const char*>(p + kFarBytes), _MM_HINT_T1);
  _mm_prefetch(reinterpret_cast<const char*>(p + kNearBytes), _MM_HINT_T0);
}

// The sum of every one of eight vectors.
inline __m256 sums_of(const __m256* r) {
  const __m256 low = _mm256_hadd_ps(_mm256_hadd_ps(r[0], r[1]), _mm256_hadd_ps(r[2], r[3]));
  const __m256 high = _mm256_hadd_ps(_mm256_hadd_ps(r[4], r[5]), _mm256_hadd_ps(r[6], r[7]));
  return _mm256_add_ps(_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31));
}

// The 32 bytes at `p`, of which `left` belong to the row; beyond them zeros.
inline __m256i load_some(const uint8_t* p, size_t left) {
  if (left >= 32) return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  alignas(32) uint8_t rest[32] = {};
  std::memcpy(rest, p, left);
  return _mm256_load_si256(reinterpret_cast<const __m256i*>(rest));
}

// Adds the products of 32 bytes of weights with M activation rows; `at` is their first element in the packed rows.
template <class Widen, size_t M, size_t kSums, size_t v = 0>
GLM_INLINE void multiply_add(__m256i raw, const float* const* x, size_t at, size_t turn, __m256 (&sum)[M][kSums]) {
  if constexpr (v < Widen::kVectors) {
    const size_t u = (turn * Widen::kVectors + v) % kSums;
    const __m256 weight = Widen::template vector<v>(raw);
#pragma GCC unroll 8
    for (size_t m = 0; m < M; ++m) {
      sum[m][u] = _mm256_fmadd_ps(weight, _mm256_load_ps(x[m] + at + 8 * v), sum[m][u]);
    }
    multiply_add<Widen, M, kSums, v + 1>(raw, x, at, turn, sum);
  }
}

// Adds the products of `count` elements of a weight row with those of M activation rows, element `at` of each on, to
// total[m * kRowGroup], vectors whose lanes are yet to be added.
template <class Widen, size_t M>
GLM_INLINE void dot(const uint8_t* row, const float* const* x, size_t at, size_t count, __m256* total) {
  // Independent sums hide the latency of the multipliers, which have eight products under way; sixteen registers bound
  // them.
  constexpr size_t kSums = M == 1 ? 8 : M == 2 ? 4 : M <= 5 ? 2 : 1;
  constexpr size_t kGroup = 8 * Widen::kVectors;  // elements in 32 bytes
  constexpr size_t kTurns = kSums > 2 * Widen::kVectors ? kSums / Widen::kVectors : 2;
  __m256 sum[M][kSums];
#pragma GCC unroll 16
  for (size_t i = 0; i < M * kSums; ++i) sum[i / kSums][i % kSums] = _mm256_setzero_ps();
  size_t k = 0;
  for (; k + kTurns * kGroup <= count; k += kTurns * kGroup) {
    const uint8_t* p = row + k * Widen::kBytes;
#pragma GCC unroll 8
    for (size_t turn = 0; turn < kTurns; ++turn) {
      if (turn % 2 == 0) prefetch(p + 32 * turn);
      const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32 * turn));
      multiply_add<Widen, M, kSums>(raw, x, at + k + turn * kGroup, turn, sum);
    }
  }
  for (; k < count; k += kGroup) {
    multiply_add<Widen, M, kSums>(load_some(row + k * Widen::kBytes, (count - k) * Widen::kBytes), x, at + k, 0, sum);
  }
#pragma GCC unroll 8
  for (size_t m = 0; m < M; ++m) {
    if constexpr (kSums == 8) {
#pragma GCC unroll 4
      for (size_t u = 0; u < 4; ++u) sum[m][u] = _mm256_add_ps(sum[m][u], sum[m][u + 4]);
    }
    if constexpr (kSums >= 4) {
#pragma GCC unroll 2
      for (size_t u = 0; u < 2; ++u) sum[m][u] = _mm256_add_ps(sum[m][u], sum[m][u + 2]);
    }
    if constexpr (kSums >= 2) sum[m][0] = _mm256_add_ps(sum[m][0], sum[m][1]);
    total[m * kRowGroup] = at == 0 ? sum[m][0] : _mm256_add_ps(total[m * kRowGroup], sum[m][0]);
  }
}

// Few activation rows: the weights stream by in the order of memory, each is read and widened once. Activations that
// the first cache does not hold are taken in pieces, each for a group of weight rows.
template <class Widen, size_t M>
void multiply_few(const uint8_t* w, size_t rows, const void* const* activations, size_t width, float* y,
                  size_t stride) {
  constexpr size_t kPiece = kFirstCacheBytes / sizeof(float) / M / 64 * 64;
  const float* x[M];
  for (size_t m = 0; m < M; ++m) x[m] = static_cast<const float*>(activations[m]);
  __m256 sums[M * kRowGroup] = {};
  for (size_t n = 0; n < rows; n += kRowGroup) {
    const size_t group = std::min(kRowGroup, rows - n);
    for (size_t at = 0; at < width; at += kPiece) {
      const size_t count = std::min(kPiece, width - at);
      for (size_t i = 0; i < group; ++i) {
        dot<Widen, M>(w + ((n + i) * width + at) * Widen::kBytes, x, at, count, sums + i);
      }
    }
    for (size_t m = 0; m < M; ++m) {
      alignas(32) float out[kRowGroup];
      _mm256_store_ps(out, _mm256_mul_ps(sums_of(sums + m * kRowGroup), _mm256_set1_ps(Widen::kFactor)));
      std::memcpy(y + m * stride + n, out, group * sizeof(float));
    }
  }
}

// A weight row, widened: `count` elements of it from element k on, which is the first of a group, are written to
// `wide` with zeros up to the group's end.
template <class Widen, size_t v = 0>
inline void store_wide(__m256i raw, float* wide) {
  if constexpr (v < Widen::kVectors) {
    _mm256_store_ps(wide + 8 * v, Widen::template vector<v>(raw));
    store_wide<Widen, v + 1>(raw, wide);
  }
}

template <class Widen>
void widen_row(const uint8_t* row, size_t k, size_t count, float* wide) {
  constexpr size_t kGroup = 8 * Widen::kVectors;
  const uint8_t* p = row + k * Widen::kBytes;
  for (size_t i = 0; i < count; i += kGroup) {
    if (i * Widen::kBytes % 64 == 0) prefetch(p + i * Widen::kBytes);
    store_wide<Widen>(load_some(p + i * Widen::kBytes, (count - i) * Widen::kBytes), wide + i);
  }
}

template <class Widen>
size_t padded(size_t width) {
  constexpr size_t kGroup = 8 * Widen::kVectors;
  return (width + kGroup - 1) / kGroup * kGroup;
}

template <class Widen>
void multiply_as(const uint8_t* w, size_t rows, const void* const* x, size_t count, size_t width, float* y,
                 size_t stride) {
  using Few = void (*)(const uint8_t*, size_t, const void* const*, size_t, float*, size_t);
  static constexpr Few kFew[kMostFew] = {multiply_few<Widen, 1>, multiply_few<Widen, 2>, multiply_few<Widen, 3>,
                                         multiply_few<Widen, 4>, multiply_few<Widen, 5>, multiply_few<Widen, 6>,
                                         multiply_few<Widen, 7>, multiply_few<Widen, 8>};
  if (count == 0) return;
  if (count <= kMostFew) return kFew[count - 1](w, rows, x, width, y, stride);
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
    r[1] = _mm256_shuffle_ps(low[0], low[1], 0xee);
    r[2] = _mm256_shuffle_ps(high[0], high[1], 0x44);
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
  return with_widener(form, [&](auto widen) { return (padded<decltype(widen)>(width) * 4 + 63) / 64 * 64; });
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
