// How AVX-512 reads weights and orders activations, for each Form. 64 bytes of a weight row become kVectors vectors of
// 16 float32 numbers or of 16 pairs of bfloat16 numbers, in the order that takes the fewest instructions; pack() brings
// the activations that they meet into the same order.
#pragma once

#include <immintrin.h>

#include "plugins/cpu/gemm_inline.h"

namespace glm {
namespace {

struct Float32Products {
  static __m512 multiply_add(__m512 sum, __m512i a, __m512i b) {
    return _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), sum);
  }
};

// The instruction takes subnormal factors for zero, so a product may lose up to 2^-126 times the other factor, and
// makes zeros of subnormal sums. No E4M3 number is subnormal as a bfloat16 number.
struct Bf16Products {
  static __m512 multiply_add(__m512 sum, __m512i a, __m512i b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
  }

  // The upper halves of 16 float32 numbers.
  static __m256i upper_halves(const float* x) {
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_loadu_si512(x), 16));
  }
};

template <Form form>
struct Weights;

template <>
struct Weights<Form::f32_f32> : Float32Products {
  static constexpr size_t kBytes = 4, kVectors = 1;
  void widen(__m512i bytes, __m512i (&to)[kVectors]) const { to[0] = bytes; }
  static void pack(const float* x, uint8_t* to) { std::memcpy(to, x, 64); }
};

template <>
struct Weights<Form::f32_bf16> : Float32Products {
  static constexpr size_t kBytes = 2, kVectors = 2;
  void widen(__m512i bytes, __m512i (&to)[kVectors]) const {
    to[0] = _mm512_slli_epi32(bytes, 16);
    to[1] = _mm512_and_si512(bytes, _mm512_set1_epi32(static_cast<int>(0xffff0000u)));
  }
  static void pack(const float* x, uint8_t* to) {
    float* even = reinterpret_cast<float*>(to);
    for (size_t i = 0; i < 16; ++i) {
      even[i] = x[2 * i];
      even[16 + i] = x[2 * i + 1];
    }
  }
};

template <>
struct Weights<Form::f32_f16> : Float32Products {
  static constexpr size_t kBytes = 2, kVectors = 2;
  void widen(__m512i bytes, __m512i (&to)[kVectors]) const {
    to[0] = _mm512_castps_si512(_mm512_cvtph_ps(_mm512_castsi512_si256(bytes)));
    to[1] = _mm512_castps_si512(_mm512_cvtph_ps(_mm512_extracti64x4_epi64(bytes, 1)));
  }
  static void pack(const float* x, uint8_t* to) { std::memcpy(to, x, 128); }
};

template <>
struct Weights<Form::bf16_bf16> : Bf16Products {
  static constexpr size_t kBytes = 2, kVectors = 1;
  void widen(__m512i bytes, __m512i (&to)[kVectors]) const { to[0] = bytes; }
  static void pack(const float* x, uint8_t* to) {
    for (size_t half = 0; half < 2; ++half) {
      _mm256_store_si256(reinterpret_cast<__m256i*>(to) + half, upper_halves(x + half * 16));
    }
  }
};

// The bfloat16 numbers of all positive E4M3 numbers, byte by byte. NaN is not told apart: no build lets one into a
// bundle.
struct E4m3Table {
  alignas(64) uint8_t low[128], high[128];
};
constexpr E4m3Table e4m3_table() {
  E4m3Table table = {};
  for (uint32_t byte = 1; byte < 128; ++byte) {
    uint32_t exponent = byte >> 3, mantissa = byte & 7;
    if (exponent > 0) {
      mantissa += 8;
    } else {
      for (exponent = 1; mantissa < 8; mantissa *= 2) --exponent;  // wraps around and comes back with the bias
    }
    const uint32_t bits = (exponent + 120) << 7 | (mantissa - 8) << 4;
    table.low[byte] = static_cast<uint8_t>(bits & 0xff);
    table.high[byte] = static_cast<uint8_t>(bits >> 8);
  }
  return table;
}
constexpr E4m3Table kE4m3Table = e4m3_table();

template <>
struct Weights<Form::bf16_e4m3> : Bf16Products {
  static constexpr size_t kBytes = 1, kVectors = 2;
  void widen(__m512i bytes, __m512i (&to)[kVectors]) const {
    // The permutes look at the lowest seven bits only; the sign is put in afterwards (high | (bytes & sign)).
    const __m512i low = _mm512_permutex2var_epi8(low_[0], bytes, low_[1]);
    const __m512i positive = _mm512_permutex2var_epi8(high_[0], bytes, high_[1]);
    const __m512i high = _mm512_ternarylogic_epi32(positive, bytes, sign_, 0xf8);
    // Of every 16 bytes, the first vector gets the first eight and the second the others.
    to[0] = _mm512_unpacklo_epi8(low, high);
    to[1] = _mm512_unpackhi_epi8(low, high);
  }
  static void pack(const float* x, uint8_t* to) {
    for (size_t part = 0; part < 4; ++part) {
      const __m256i halves = upper_halves(x + part * 16);
      _mm_store_si128(reinterpret_cast<__m128i*>(to) + part, _mm256_castsi256_si128(halves));
      _mm_store_si128(reinterpret_cast<__m128i*>(to) + 4 + part, _mm256_extracti128_si256(halves, 1));
    }
  }

 private:
  const __m512i low_[2] = {_mm512_load_si512(kE4m3Table.low), _mm512_load_si512(kE4m3Table.low + 64)};
  const __m512i high_[2] = {_mm512_load_si512(kE4m3Table.high), _mm512_load_si512(kE4m3Table.high + 64)};
  const __m512i sign_ = _mm512_set1_epi8(static_cast<char>(0x80));
};

// Reads 64 bytes. Through a plain pointer, GCC would read them again for each use.
inline __m512i read64(const uint8_t* from) { return *reinterpret_cast<const volatile __m512i_u*>(from); }

// Reads 64 bytes of a row, or the `left` elements that it still has and zeros.
template <class W>
inline void read(const W& weights, const uint8_t* from, size_t left, __m512i (&to)[W::kVectors]) {
  const size_t bytes = left * W::kBytes;
  const __mmask64 mask = (static_cast<__mmask64>(1) << bytes % 64) - 1;
  weights.widen(bytes >= 64 ? read64(from) : _mm512_maskz_loadu_epi8(mask, from), to);
}

}  // namespace
}  // namespace glm
