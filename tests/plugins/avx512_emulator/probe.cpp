// Every emulated intrinsic on numbers from outside; with the compiler's own header it is the processor that answers.
#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#define PROBE(name) \
  extern "C" __attribute__((visibility("default"))) void name(const void* a, const void* b, const void* c, void* y)

namespace glm {
namespace {

__m512i i(const void* p) { return _mm512_loadu_si512(p); }
__m512 f(const void* p) { return _mm512_loadu_ps(p); }
uint64_t number(const void* p) { return *static_cast<const uint64_t*>(p); }
void put(void* y, __m512i value) { *static_cast<__m512i_u*>(y) = value; }
void put(void* y, __m512 value) { *static_cast<__m512_u*>(y) = value; }
void put(void* y, __m256i value) { _mm256_storeu_si256(static_cast<__m256i*>(y), value); }
void put(void* y, __m128i value) { _mm_storeu_si128(static_cast<__m128i*>(y), value); }
void put(void* y, float value) { *static_cast<float*>(y) = value; }
void put(void* y, __mmask16 value) { *static_cast<uint16_t*>(y) = value; }

}  // namespace

#define PROBE1(name, value) \
  PROBE(name) {             \
    (void)b, (void)c;       \
    put(y, value);          \
  }
#define PROBE2(name, value) \
  PROBE(name) {             \
    (void)c;                \
    put(y, value);          \
  }
#define PROBE3(name, value) \
  PROBE(name) { put(y, value); }

PROBE1(load_si512, _mm512_load_si512(a))
PROBE1(load_ps, _mm512_load_ps(a))
PROBE(store_si512) {
  (void)b, (void)c;
  _mm512_store_si512(y, i(a));
}
PROBE(store_ps) {
  (void)b, (void)c;
  _mm512_store_ps(y, f(a));
}
PROBE2(maskz_loadu_epi8, _mm512_maskz_loadu_epi8(number(b), a))
PROBE(setzero) {
  (void)a, (void)b, (void)c;
  put(y, _mm512_or_si512(_mm512_castps_si512(_mm512_setzero_ps()), _mm512_setzero_si512()));
}
PROBE1(set1_ps, _mm512_set1_ps(*static_cast<const float*>(a)))
PROBE1(set1_epi32, _mm512_set1_epi32(*static_cast<const int*>(a)))
PROBE1(set1_epi8, _mm512_set1_epi8(*static_cast<const char*>(a)))
PROBE1(cast, _mm512_castps_si512(_mm512_castsi512_ps(i(a))))
PROBE1(castsi512_si256, _mm512_castsi512_si256(i(a)))
PROBE1(extracti64x4_0, _mm512_extracti64x4_epi64(i(a), 0))
PROBE1(extracti64x4_1, _mm512_extracti64x4_epi64(i(a), 1))
PROBE2(and_si512, _mm512_and_si512(i(a), i(b)))
PROBE2(or_si512, _mm512_or_si512(i(a), i(b)))
PROBE2(add_epi32, _mm512_add_epi32(i(a), i(b)))
PROBE2(sub_epi32, _mm512_sub_epi32(i(a), i(b)))
PROBE2(min_epi32, _mm512_min_epi32(i(a), i(b)))
PROBE1(slli_epi32_4, _mm512_slli_epi32(i(a), 4))
PROBE1(slli_epi32_32, _mm512_slli_epi32(i(a), 32))
PROBE1(srli_epi32_20, _mm512_srli_epi32(i(a), 20))
PROBE1(srli_epi32_32, _mm512_srli_epi32(i(a), 32))
PROBE1(srai_epi32_20, _mm512_srai_epi32(i(a), 20))
PROBE1(srai_epi32_32, _mm512_srai_epi32(i(a), 32))
PROBE2(cmpgt_epi32_mask, _mm512_cmpgt_epi32_mask(i(a), i(b)))
PROBE3(mask_blend_epi32, _mm512_mask_blend_epi32(static_cast<__mmask16>(number(c)), i(a), i(b)))
PROBE3(ternarylogic_f8, _mm512_ternarylogic_epi32(i(a), i(b), i(c), 0xf8))
PROBE3(ternarylogic_ca, _mm512_ternarylogic_epi32(i(a), i(b), i(c), 0xca))
PROBE3(permutex2var_epi8, _mm512_permutex2var_epi8(i(a), i(b), i(c)))
PROBE2(unpacklo_epi8, _mm512_unpacklo_epi8(i(a), i(b)))
PROBE2(unpackhi_epi8, _mm512_unpackhi_epi8(i(a), i(b)))
PROBE2(unpacklo_epi32, _mm512_unpacklo_epi32(i(a), i(b)))
PROBE2(unpackhi_epi32, _mm512_unpackhi_epi32(i(a), i(b)))
PROBE2(unpacklo_epi64, _mm512_unpacklo_epi64(i(a), i(b)))
PROBE2(unpackhi_epi64, _mm512_unpackhi_epi64(i(a), i(b)))
PROBE2(shuffle_i32x4_88, _mm512_shuffle_i32x4(i(a), i(b), 0x88))
PROBE2(shuffle_i32x4_d8, _mm512_shuffle_i32x4(i(a), i(b), 0xd8))
PROBE1(cvtepi32_epi16, _mm512_cvtepi32_epi16(i(a)))
PROBE1(cvtepi32_epi8, _mm512_cvtepi32_epi8(i(a)))
PROBE1(cvtph_ps, _mm512_cvtph_ps(_mm512_castsi512_si256(i(a))))
PROBE2(add_ps, _mm512_add_ps(f(a), f(b)))
PROBE2(div_ps, _mm512_div_ps(f(a), f(b)))
PROBE3(fmadd_ps, _mm512_fmadd_ps(f(a), f(b), f(c)))
PROBE1(reduce_add_ps, _mm512_reduce_add_ps(f(a)))
PROBE3(dpbf16_ps, _mm512_dpbf16_ps(f(a), (__m512bh)i(b), (__m512bh)i(c)))

}  // namespace glm
