// 32 numbers become a register of bytes; what is left of a tile takes the plain loop.
#include <immintrin.h>

#include "plugins/cpu/quantize_inline.h"

namespace glm {
namespace {

// e4m3_byte of eight numbers, in the lowest byte of each lane.
inline __m256i e4m3_bytes(__m256 v) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i magnitude = _mm256_and_si256(bits, _mm256_set1_epi32(0x7fffffff));
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(magnitude, 20), _mm256_set1_epi32(1));
  const __m256i up = _mm256_add_epi32(_mm256_add_epi32(magnitude, odd), _mm256_set1_epi32(0x7ffff - (120 << 23)));
  const __m256i normal = _mm256_srai_epi32(up, 20);
  const __m256 shift = _mm256_set1_ps(0x1p14f);
  const __m256i subnormal = _mm256_sub_epi32(_mm256_castps_si256(_mm256_add_ps(_mm256_castsi256_ps(magnitude), shift)),
                                             _mm256_castps_si256(shift));
  const __m256i is_normal = _mm256_cmpgt_epi32(magnitude, _mm256_set1_epi32((121 << 23) - 1));
  const __m256i rounded = _mm256_min_epi32(_mm256_blendv_epi8(subnormal, normal, is_normal), _mm256_set1_epi32(0x7e));
  return _mm256_or_si256(rounded, _mm256_and_si256(_mm256_srli_epi32(bits, 24), _mm256_set1_epi32(0x80)));
}

inline void store_e4m3_avx2(const float* x, size_t count, float scale, uint8_t* values) {
  const __m256 divisor = _mm256_set1_ps(scale);
  const auto bytes = [&](size_t i) { return e4m3_bytes(_mm256_div_ps(_mm256_loadu_ps(x + i), divisor)); };
  size_t i = 0;
  for (; i + 32 <= count; i += 32) {
    // Packing works on halves of registers, so groups of four come out as 0 2 4 6 1 3 5 7.
    const __m256i packed = _mm256_packus_epi16(_mm256_packus_epi32(bytes(i), bytes(i + 8)),
                                               _mm256_packus_epi32(bytes(i + 16), bytes(i + 24)));
    const __m256i ordered = _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(values + i), ordered);
  }
  store_e4m3(x + i, count - i, scale, values + i);
}

}  // namespace

size_t quantize_rows_avx2(Type type, const void* x, size_t O, size_t I, uint8_t* values, float* scales) {
  return quantize_rows(type, x, O, I, values, scales, store_e4m3_avx2);
}

}  // namespace glm
