// Weights of every dtype as float32, 32 bytes at a time, in the order that takes the fewest instructions.
//
// That order is not the one in memory: of a register of bfloat16 the even elements come first, of a register of E4M3
// those whose index is a multiple of four. Activations are packed in the same order, so the products meet.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

namespace glm {
namespace {

// A widener makes kVectors vectors of 32 bytes. kLane is the distance of elements that are neighbours in a vector.
// kFactor / kScale is what a sum of products is to be multiplied by, kScale what activations are multiplied by.
struct WidenF32 {
  static constexpr size_t kBytes = 4, kVectors = 1, kLane = 1;
  static constexpr float kScale = 1.0f, kFactor = 1.0f;
  template <size_t v>
  static __m256 vector(__m256i raw) {
    return _mm256_castsi256_ps(raw);
  }
};

struct WidenBf16 {
  static constexpr size_t kBytes = 2, kVectors = 2, kLane = 2;
  static constexpr float kScale = 1.0f, kFactor = 1.0f;
  template <size_t v>
  static __m256 vector(__m256i raw) {
    if constexpr (v == 0) return _mm256_castsi256_ps(_mm256_slli_epi32(raw, 16));
    return _mm256_castsi256_ps(_mm256_and_si256(raw, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
  }
};

struct WidenF16 {
  static constexpr size_t kBytes = 2, kVectors = 2, kLane = 1;
  static constexpr float kScale = 1.0f, kFactor = 1.0f;
  template <size_t v>
  static __m256 vector(__m256i raw) {
    return _mm256_cvtph_ps(_mm256_extracti128_si256(raw, v));
  }
};

// With its sign in the first place and its exponent in the last of a float's, an E4M3 number is 2^-120 of its value,
// subnormals included. Activations are multiplied by 2^64, so that no product is subnormal; both are powers of two and
// change no digit. NaN is not told apart: no build lets one into a bundle.
struct WidenE4m3 {
  static constexpr size_t kBytes = 1, kVectors = 4, kLane = 4;
  static constexpr float kScale = 0x1p64f, kFactor = 0x1p56f;
  template <size_t v>
  static __m256 vector(__m256i raw) {
    // Two bytes at a time, as halves of 32 bits: the high byte of each half is moved right by four places.
    const __m256i high = v % 2 == 1 ? raw : _mm256_slli_epi16(raw, 8);
    const __m256i moved = _mm256_srai_epi16(high, 4);
    const __m256i placed = v < 2 ? _mm256_slli_epi32(moved, 16) : moved;
    return _mm256_castsi256_ps(_mm256_and_si256(placed, _mm256_set1_epi32(static_cast<int>(0x87f00000u))));
  }
};

}  // namespace
}  // namespace glm
