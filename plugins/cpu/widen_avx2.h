// Weights of every dtype as float32, 32 bytes at a time, in the order that takes the fewest instructions.
//
// That order is not the one in memory: of a register of bfloat16 the even elements come first, of a register of E4M3
// those whose index leaves 0, then 2, 1 and 3 when divided by four. Activations are packed in the same order, so the
// products meet.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

namespace glm {
namespace {

// A widener makes kVectors vectors of 32 bytes: part<p> does what several of them share, of which there are kParts, and
// vector<i> the rest. kLane is the distance of elements that are neighbours in a vector. kFactor / kScale is what a sum
// of products is to be multiplied by, kScale what activations are multiplied by.
// Whose vectors share nothing.
struct Unparted {
  static constexpr size_t kParts = 1;
  template <size_t>
  static __m256i part(__m256i raw) {
    return raw;
  }
};

struct WidenF32 : Unparted {
  static constexpr size_t kBytes = 4, kVectors = 1, kLane = 1;
  static constexpr float kScale = 1.0f, kFactor = 1.0f;
  template <size_t>
  static __m256 vector(__m256i part) {
    return _mm256_castsi256_ps(part);
  }
};

struct WidenBf16 : Unparted {
  static constexpr size_t kBytes = 2, kVectors = 2, kLane = 2;
  static constexpr float kScale = 1.0f, kFactor = 1.0f;
  template <size_t i>
  static __m256 vector(__m256i part) {
    if constexpr (i == 0) return _mm256_castsi256_ps(_mm256_slli_epi32(part, 16));
    return _mm256_castsi256_ps(_mm256_and_si256(part, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
  }
};

struct WidenF16 : Unparted {
  static constexpr size_t kBytes = 2, kVectors = 2, kLane = 1;
  static constexpr float kScale = 1.0f, kFactor = 1.0f;
  template <size_t i>
  static __m256 vector(__m256i part) {
    return _mm256_cvtph_ps(_mm256_extracti128_si256(part, i));
  }
};

// With its sign in the first place and its exponent in the last of a float's, an E4M3 number is 2^-120 of its value,
// subnormals included. Activations are multiplied by 2^64, so that no product is subnormal; both are powers of two and
// change no digit. NaN is not told apart: no build lets one into a bundle.
struct WidenE4m3 {
  static constexpr size_t kBytes = 1, kVectors = 4, kParts = 2, kLane = 4;
  static constexpr float kScale = 0x1p64f, kFactor = 0x1p56f;
  // Every other byte of the register, the low or the high ones of its halves of 32 bits, as 16 bits with its exponent
  // in place: a signed byte times 16, or what is left when the high byte moves right by four.
  template <size_t p>
  static __m256i part(__m256i raw) {
    if constexpr (p == 0) return _mm256_maddubs_epi16(_mm256_set1_epi16(16), raw);
    return _mm256_srai_epi16(raw, 4);
  }
  template <size_t i>
  static __m256 vector(__m256i part) {
    const __m256i placed = i == 0 ? _mm256_slli_epi32(part, 16) : part;
    return _mm256_castsi256_ps(_mm256_and_si256(placed, _mm256_set1_epi32(static_cast<int>(0x87f00000u))));
  }
};

}  // namespace
}  // namespace glm
