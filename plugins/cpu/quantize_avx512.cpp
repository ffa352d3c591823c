// 16 numbers become 16 bytes; what is left of a tile takes the plain loop.
#include <immintrin.h>

#include "plugins/cpu/quantize_inline.h"

namespace glm {
namespace {

// e4m3_byte of sixteen numbers.
inline __m128i e4m3_bytes(__m512 v) {
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i magnitude = _mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff));
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(magnitude, 20), _mm512_set1_epi32(1));
  const __m512i up = _mm512_add_epi32(_mm512_add_epi32(magnitude, odd), _mm512_set1_epi32(0x7ffff - (120 << 23)));
  const __m512i normal = _mm512_srai_epi32(up, 20);
  const __m512 shift = _mm512_set1_ps(0x1p14f);
  const __m512i subnormal = _mm512_sub_epi32(_mm512_castps_si512(_mm512_add_ps(_mm512_castsi512_ps(magnitude), shift)),
                                             _mm512_castps_si512(shift));
  const __mmask16 is_normal = _mm512_cmpgt_epi32_mask(magnitude, _mm512_set1_epi32((121 << 23) - 1));
  const __m512i rounded =
      _mm512_min_epi32(_mm512_mask_blend_epi32(is_normal, subnormal, normal), _mm512_set1_epi32(0x7e));
  const __m512i sign = _mm512_and_si512(_mm512_srli_epi32(bits, 24), _mm512_set1_epi32(0x80));
  return _mm512_cvtepi32_epi8(_mm512_or_si512(rounded, sign));
}

inline void store_e4m3_avx512(const float* x, size_t count, float scale, uint8_t* values) {
  const __m512 divisor = _mm512_set1_ps(scale);
  size_t i = 0;
  for (; i + 16 <= count; i += 16) {
    const __m128i bytes = e4m3_bytes(_mm512_div_ps(_mm512_loadu_ps(x + i), divisor));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(values + i), bytes);
  }
  store_e4m3(x + i, count - i, scale, values + i);
}

}  // namespace

size_t quantize_rows_avx512(Type type, const void* x, size_t O, size_t I, uint8_t* values, float* scales) {
  return quantize_rows(type, x, O, I, values, scales, store_e4m3_avx512);
}

}  // namespace glm
