// AVX2 with FMA and F16C: every weight is widened to float32, eight at a time, and multiplied in float32.
#include <immintrin.h>

#include <vector>

#include "plugins/cpu/gemm_inline.h"

namespace glm {
namespace {

constexpr size_t kPrefetchBytes = 2048;  // ahead of a stream of weights

struct WidenF32 {
  static constexpr size_t kBytes = 4;
  static constexpr float kFactor = 1.0f;
  __m256 operator()(const uint8_t* p) const { return _mm256_loadu_ps(reinterpret_cast<const float*>(p)); }
};
struct WidenBf16 {
  static constexpr size_t kBytes = 2;
  static constexpr float kFactor = 1.0f;
  __m256 operator()(const uint8_t* p) const {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
  }
};
struct WidenF16 {
  static constexpr size_t kBytes = 2;
  static constexpr float kFactor = 1.0f;
  __m256 operator()(const uint8_t* p) const {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
};
// As a half, an E4M3 number with its bits in the same places is 2^-8 of its value, subnormals included; F16C widens
// halves and the factor goes to the sum. NaN is not told apart: no build lets one into a bundle.
struct WidenE4m3 {
  static constexpr size_t kBytes = 1;
  static constexpr float kFactor = 256.0f;
  __m256 operator()(const uint8_t* p) const {
    const __m128i wide = _mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    const __m128i magnitude = _mm_and_si128(_mm_slli_epi16(wide, 7), _mm_set1_epi16(0x3f80));
    const __m128i sign = _mm_and_si128(_mm_slli_epi16(wide, 8), _mm_set1_epi16(static_cast<short>(0x8000)));
    return _mm256_cvtph_ps(_mm_or_si128(magnitude, sign));
  }
};

inline float sum_of(__m256 v) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_shuffle_ps(half, half, 1)));
}

// Widens weights k .. k + 7 of a row; beyond its end they are zero.
template <class Widen>
inline __m256 widen_at(const Widen& widen, const uint8_t* row, size_t k, size_t width) {
  if (k + 8 <= width) return widen(row + k * Widen::kBytes);
  alignas(32) uint8_t rest[8 * 4] = {};
  std::memcpy(rest, row + k * Widen::kBytes, (width - k) * Widen::kBytes);
  return widen(rest);
}

// One weight row times M activation rows, streaming the weights: each is read and widened once.
template <class Widen, size_t M>
void dot_few(const uint8_t* row, const void* const* x, size_t width, float* y, size_t stride) {
  const Widen widen;
  constexpr size_t kSums = M == 1 ? 4 : M == 2 ? 2 : 1;  // enough independent sums to hide the multiplier's latency
  __m256 sum[M][kSums];
  for (auto& each : sum) {
    for (auto& part : each) part = _mm256_setzero_ps();
  }
  size_t k = 0;
  for (; k + 8 * kSums <= width; k += 8 * kSums) {
    _mm_prefetch(reinterpret_cast<const char*>(row + k * Widen::kBytes + kPrefetchBytes), _MM_HINT_T0);
#pragma GCC unroll 4
    for (size_t u = 0; u < kSums; ++u) {
      const __m256 weight = widen(row + (k + 8 * u) * Widen::kBytes);
#pragma GCC unroll 8
      for (size_t m = 0; m < M; ++m) {
        const __m256 value = _mm256_load_ps(static_cast<const float*>(x[m]) + k + 8 * u);
        sum[m][u] = _mm256_fmadd_ps(weight, value, sum[m][u]);
      }
    }
  }
  for (; k < width; k += 8) {
    const __m256 weight = widen_at(widen, row, k, width);
    for (size_t m = 0; m < M; ++m) {
      sum[m][0] = _mm256_fmadd_ps(weight, _mm256_load_ps(static_cast<const float*>(x[m]) + k), sum[m][0]);
    }
  }
  for (size_t m = 0; m < M; ++m) {
    for (size_t u = 1; u < kSums; ++u) sum[m][0] = _mm256_add_ps(sum[m][0], sum[m][u]);
    y[m * stride] = sum_of(sum[m][0]) * Widen::kFactor;
  }
}

constexpr size_t kBlockRows = 4;

// 4 widened weight rows times M activation rows: for M = 3 twelve sums, seven loads and twelve products at a time, so
// the multipliers are the limit and not the loads.
template <size_t M>
void block(const float* weights, size_t padded, const void* const* x, float factor, float* y, size_t stride) {
  __m256 sum[M][kBlockRows];
  for (auto& each : sum) {
    for (auto& part : each) part = _mm256_setzero_ps();
  }
  for (size_t k = 0; k < padded; k += 8) {
    __m256 value[M];
#pragma GCC unroll 4
    for (size_t m = 0; m < M; ++m) value[m] = _mm256_load_ps(static_cast<const float*>(x[m]) + k);
#pragma GCC unroll 4
    for (size_t n = 0; n < kBlockRows; ++n) {
      const __m256 weight = _mm256_load_ps(weights + n * padded + k);
#pragma GCC unroll 4
      for (size_t m = 0; m < M; ++m) sum[m][n] = _mm256_fmadd_ps(weight, value[m], sum[m][n]);
    }
  }
  for (size_t m = 0; m < M; ++m) {
    for (size_t n = 0; n < kBlockRows; ++n) y[m * stride + n] = sum_of(sum[m][n]) * factor;
  }
}

// Many activation rows: four weight rows at a time are widened into the cache and meet all of them.
template <class Widen>
void multiply_many(const uint8_t* w, size_t rows, const void* const* x, size_t count, size_t width, float* y,
                   size_t stride) {
  const Widen widen;
  const size_t padded = (width + 7) / 8 * 8;
  thread_local std::vector<float> buffer;
  if (buffer.size() < kBlockRows * padded + 16) buffer.resize(kBlockRows * padded + 16);
  auto* wide = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(buffer.data()) + 63) / 64 * 64);
  for (size_t n = 0; n < rows; n += kBlockRows) {
    for (size_t i = 0; i < kBlockRows; ++i) {
      // Beyond the last row the last one is taken again, into sums that are not kept.
      const uint8_t* row = w + (n + i < rows ? n + i : rows - 1) * width * Widen::kBytes;
      for (size_t k = 0; k < padded; k += 8) _mm256_store_ps(wide + i * padded + k, widen_at(widen, row, k, width));
    }
    const size_t kept = rows - n < kBlockRows ? rows - n : kBlockRows;
    float sums[3 * kBlockRows];
    for (size_t m = 0; m < count;) {
      const size_t left = count - m;
      const size_t taken = left >= 3 ? 3 : left;
      if (taken == 3) {
        block<3>(wide, padded, x + m, Widen::kFactor, sums, kBlockRows);
      } else if (taken == 2) {
        block<2>(wide, padded, x + m, Widen::kFactor, sums, kBlockRows);
      } else {
        block<1>(wide, padded, x + m, Widen::kFactor, sums, kBlockRows);
      }
      for (size_t t = 0; t < taken; ++t) std::memcpy(y + (m + t) * stride + n, sums + t * kBlockRows, kept * 4);
      m += taken;
    }
  }
}

template <class Widen>
void multiply_as(const uint8_t* w, size_t rows, const void* const* x, size_t count, size_t width, float* y,
                 size_t stride) {
  using Few = void (*)(const uint8_t*, const void* const*, size_t, float*, size_t);
  static constexpr Few kFew[] = {dot_few<Widen, 1>, dot_few<Widen, 2>, dot_few<Widen, 3>, dot_few<Widen, 4>,
                                 dot_few<Widen, 5>, dot_few<Widen, 6>, dot_few<Widen, 7>, dot_few<Widen, 8>};
  if (count > 8) return multiply_many<Widen>(w, rows, x, count, width, y, stride);
  if (count == 0) return;
  for (size_t n = 0; n < rows; ++n) kFew[count - 1](w + n * width * Widen::kBytes, x, width, y + n, stride);
}

size_t packed_bytes(Form, size_t width) { return (width * 4 + 63) / 64 * 64; }

void pack(Form form, const float* x, size_t width, void* packed) {
  std::memcpy(packed, x, width * 4);
  std::memset(static_cast<float*>(packed) + width, 0, packed_bytes(form, width) - width * 4);
}

void multiply(Form form, const void* weights, size_t rows, const void* const* activations, size_t count, size_t width,
              float* y, size_t stride) {
  const auto* w = static_cast<const uint8_t*>(weights);
  switch (form) {
    case Form::f32_f32:
      return multiply_as<WidenF32>(w, rows, activations, count, width, y, stride);
    case Form::f32_bf16:
    case Form::bf16_bf16:
      return multiply_as<WidenBf16>(w, rows, activations, count, width, y, stride);
    case Form::f32_f16:
      return multiply_as<WidenF16>(w, rows, activations, count, width, y, stride);
    case Form::bf16_e4m3:
      return multiply_as<WidenE4m3>(w, rows, activations, count, width, y, stride);
  }
}

}  // namespace

const Gemm kGemmAvx2 = {packed_bytes, pack, multiply, quantize_row, silu_mul};

}  // namespace glm
