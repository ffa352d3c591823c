// AVX-512 for machines without it. In front of the compiler's own header on the include path, this one adds to the
// project's namespace what the kernels call; there it hides the compiler's intrinsics of the same names, and no kernel
// knows. What is missing here ends in the compiler's error that the instruction set is not there.
//
// Every function follows the instruction's operation in Intel's manual (Intel 64 and IA-32 Architectures Software
// Developer's Manual, volume 2), on GCC's vectors or number by number. AVX2, FMA and F16C have to be there.
#pragma once

#include_next <immintrin.h>

#include <cstdint>
#include <cstring>

// Compilers that make macros of intrinsics with constants.
#undef _mm512_cmpgt_epi32_mask
#undef _mm512_extracti64x4_epi64
#undef _mm512_shuffle_i32x4
#undef _mm512_slli_epi32
#undef _mm512_srai_epi32
#undef _mm512_srli_epi32
#undef _mm512_ternarylogic_epi32

#define GLM_EMULATED inline __attribute__((always_inline))

namespace glm {
namespace emulator {

template <class T>
struct Vector {
  typedef T type __attribute__((vector_size(64), may_alias));
};
using I8 = Vector<int8_t>::type;
using I32 = Vector<int32_t>::type;
using U32 = Vector<uint32_t>::type;

// A vector, number by number.
template <class T>
struct Lanes {
  static constexpr size_t kCount = 64 / sizeof(T);
  T at[kCount];
  Lanes() = default;
  template <class V>
  explicit Lanes(V v) {
    static_assert(sizeof(V) == 64, "a whole vector");
    std::memcpy(at, &v, 64);
  }
  template <class V>
  V as() const {
    static_assert(sizeof(V) == 64, "a whole vector");
    V v;
    std::memcpy(&v, at, 64);
    return v;
  }
};

// An aligned access faults elsewhere.
GLM_EMULATED void expect_aligned(const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % 64) __builtin_trap();
}

// The lower or upper half of each 128 bits of a, alternating with that of b.
template <class T>
GLM_EMULATED __m512i unpack(__m512i a, __m512i b, bool upper) {
  constexpr size_t kLane = 16 / sizeof(T);
  const Lanes<T> from_a(a), from_b(b);
  Lanes<T> to;
  for (size_t i = 0; i < Lanes<T>::kCount; ++i) {
    const size_t source = i / kLane * kLane + (upper ? kLane / 2 : 0) + i % kLane / 2;
    to.at[i] = i % 2 ? from_b.at[source] : from_a.at[source];
  }
  return to.template as<__m512i>();
}

// Subnormal numbers become zeros with their sign.
GLM_EMULATED U32 flushed(U32 bits) { return bits & ((U32)((bits & 0x7f800000u) != 0) | 0x80000000u); }

GLM_EMULATED __m512 fused(U32 a, U32 b, U32 c) {
  const Lanes<float> x(a), y(b), z(c);
  Lanes<float> to;
  for (size_t i = 0; i < 16; ++i) to.at[i] = __builtin_fmaf(x.at[i], y.at[i], z.at[i]);
  return to.as<__m512>();
}

}  // namespace emulator

// Memory.
GLM_EMULATED __m512i _mm512_loadu_si512(const void* p) { return *static_cast<const __m512i_u*>(p); }
GLM_EMULATED __m512 _mm512_loadu_ps(const void* p) { return *static_cast<const __m512_u*>(p); }
GLM_EMULATED __m512i _mm512_load_si512(const void* p) {
  emulator::expect_aligned(p);
  return *static_cast<const __m512i*>(p);
}
GLM_EMULATED __m512 _mm512_load_ps(const void* p) { return (__m512)_mm512_load_si512(p); }
GLM_EMULATED void _mm512_store_si512(void* p, __m512i a) {
  emulator::expect_aligned(p);
  *static_cast<__m512i*>(p) = a;
}
GLM_EMULATED void _mm512_store_ps(void* p, __m512 a) { _mm512_store_si512(p, (__m512i)a); }
// Bytes without their bit in the mask are not touched.
inline __m512i _mm512_maskz_loadu_epi8(__mmask64 k, const void* p) {
  emulator::Lanes<uint8_t> to{};
  for (size_t i = 0; i < 64; ++i) {
    if (k >> i & 1) to.at[i] = static_cast<const uint8_t*>(p)[i];
  }
  return to.as<__m512i>();
}

// Constants and other views of the same bits.
GLM_EMULATED __m512 _mm512_setzero_ps() { return __m512{}; }
GLM_EMULATED __m512i _mm512_setzero_si512() { return __m512i{}; }
GLM_EMULATED __m512 _mm512_set1_ps(float a) { return a - __m512{}; }
GLM_EMULATED __m512i _mm512_set1_epi32(int a) { return (__m512i)(a + emulator::I32{}); }
GLM_EMULATED __m512i _mm512_set1_epi8(char a) { return (__m512i)(static_cast<int8_t>(a) + emulator::I8{}); }
GLM_EMULATED __m512 _mm512_castsi512_ps(__m512i a) { return (__m512)a; }
GLM_EMULATED __m512i _mm512_castps_si512(__m512 a) { return (__m512i)a; }
GLM_EMULATED __m256i _mm512_castsi512_si256(__m512i a) {
  __m256i low;
  std::memcpy(&low, &a, 32);
  return low;
}
GLM_EMULATED __m256i _mm512_extracti64x4_epi64(__m512i a, int half) {
  __m256i found;
  std::memcpy(&found, reinterpret_cast<const char*>(&a) + (half & 1) * 32, 32);
  return found;
}

// Integers.
GLM_EMULATED __m512i _mm512_and_si512(__m512i a, __m512i b) { return a & b; }
GLM_EMULATED __m512i _mm512_or_si512(__m512i a, __m512i b) { return a | b; }
GLM_EMULATED __m512i _mm512_add_epi32(__m512i a, __m512i b) { return (__m512i)((emulator::U32)a + (emulator::U32)b); }
GLM_EMULATED __m512i _mm512_sub_epi32(__m512i a, __m512i b) { return (__m512i)((emulator::U32)a - (emulator::U32)b); }
GLM_EMULATED __m512i _mm512_min_epi32(__m512i a, __m512i b) {
  const auto x = (emulator::I32)a, y = (emulator::I32)b;
  return (__m512i)(x < y ? x : y);
}
GLM_EMULATED __m512i _mm512_slli_epi32(__m512i a, unsigned n) {
  return n > 31 ? __m512i{} : (__m512i)((emulator::U32)a << n);
}
GLM_EMULATED __m512i _mm512_srli_epi32(__m512i a, unsigned n) {
  return n > 31 ? __m512i{} : (__m512i)((emulator::U32)a >> n);
}
GLM_EMULATED __m512i _mm512_srai_epi32(__m512i a, unsigned n) {
  return (__m512i)((emulator::I32)a >> static_cast<int>(n > 31 ? 31 : n));
}
inline __mmask16 _mm512_cmpgt_epi32_mask(__m512i a, __m512i b) {
  const emulator::Lanes<int32_t> x(a), y(b);
  unsigned mask = 0;
  for (unsigned i = 0; i < 16; ++i) mask |= static_cast<unsigned>(x.at[i] > y.at[i]) << i;
  return static_cast<__mmask16>(mask);
}
inline __m512i _mm512_mask_blend_epi32(__mmask16 k, __m512i a, __m512i b) {
  const emulator::Lanes<int32_t> x(a), y(b);
  emulator::Lanes<int32_t> to;
  for (size_t i = 0; i < 16; ++i) to.at[i] = k >> i & 1 ? y.at[i] : x.at[i];
  return to.as<__m512i>();
}
// Of every bit, bit 4 a + 2 b + c of the table.
inline __m512i _mm512_ternarylogic_epi32(__m512i a, __m512i b, __m512i c, int table) {
  __m512i to = {};
  for (int row = 0; row < 8; ++row) {
    if (table >> row & 1) to |= (row & 4 ? a : ~a) & (row & 2 ? b : ~b) & (row & 1 ? c : ~c);
  }
  return to;
}

// Bytes and numbers in another order.
// The seven lowest bits of an index choose among the 128 bytes of a and b.
inline __m512i _mm512_permutex2var_epi8(__m512i a, __m512i indices, __m512i b) {
  const emulator::Lanes<uint8_t> from[2] = {emulator::Lanes<uint8_t>(a), emulator::Lanes<uint8_t>(b)};
  const emulator::Lanes<uint8_t> index(indices);
  emulator::Lanes<uint8_t> to;
  for (size_t i = 0; i < 64; ++i) to.at[i] = from[index.at[i] >> 6 & 1].at[index.at[i] & 63];
  return to.as<__m512i>();
}
GLM_EMULATED __m512i _mm512_unpacklo_epi8(__m512i a, __m512i b) { return emulator::unpack<uint8_t>(a, b, false); }
GLM_EMULATED __m512i _mm512_unpackhi_epi8(__m512i a, __m512i b) { return emulator::unpack<uint8_t>(a, b, true); }
GLM_EMULATED __m512i _mm512_unpacklo_epi32(__m512i a, __m512i b) { return emulator::unpack<uint32_t>(a, b, false); }
GLM_EMULATED __m512i _mm512_unpackhi_epi32(__m512i a, __m512i b) { return emulator::unpack<uint32_t>(a, b, true); }
GLM_EMULATED __m512i _mm512_unpacklo_epi64(__m512i a, __m512i b) { return emulator::unpack<uint64_t>(a, b, false); }
GLM_EMULATED __m512i _mm512_unpackhi_epi64(__m512i a, __m512i b) { return emulator::unpack<uint64_t>(a, b, true); }
// Two fours of a, then two of b, each by two bits of the choice.
GLM_EMULATED __m512i _mm512_shuffle_i32x4(__m512i a, __m512i b, int choice) {
  __m512i to;
  for (int i = 0; i < 4; ++i) {
    const char* from = reinterpret_cast<const char*>(i < 2 ? &a : &b) + (choice >> 2 * i & 3) * 16;
    std::memcpy(reinterpret_cast<char*>(&to) + i * 16, from, 16);
  }
  return to;
}

// Conversions: the lowest bits of every number, or halves to floats.
inline __m256i _mm512_cvtepi32_epi16(__m512i a) {
  const emulator::Lanes<uint32_t> from(a);
  uint16_t to[16];
  for (size_t i = 0; i < 16; ++i) to[i] = static_cast<uint16_t>(from.at[i]);
  __m256i found;
  std::memcpy(&found, to, 32);
  return found;
}
inline __m128i _mm512_cvtepi32_epi8(__m512i a) {
  const emulator::Lanes<uint32_t> from(a);
  uint8_t to[16];
  for (size_t i = 0; i < 16; ++i) to[i] = static_cast<uint8_t>(from.at[i]);
  __m128i found;
  std::memcpy(&found, to, 16);
  return found;
}
inline __m512 _mm512_cvtph_ps(__m256i a) {
  const __m256 halves[2] = {_mm256_cvtph_ps(_mm256_castsi256_si128(a)),
                            _mm256_cvtph_ps(_mm256_extracti128_si256(a, 1))};
  __m512 to;
  std::memcpy(&to, halves, 64);
  return to;
}

// Arithmetic.
GLM_EMULATED __m512 _mm512_add_ps(__m512 a, __m512 b) { return a + b; }
GLM_EMULATED __m512 _mm512_div_ps(__m512 a, __m512 b) { return a / b; }
GLM_EMULATED __m512 _mm512_fmadd_ps(__m512 a, __m512 b, __m512 c) {
  return emulator::fused((emulator::U32)a, (emulator::U32)b, (emulator::U32)c);
}
// A sequence of the compiler's, in an order of its own.
inline float _mm512_reduce_add_ps(__m512 a) {
  const emulator::Lanes<float> from(a);
  float sum[8];
  for (size_t i = 0; i < 8; ++i) sum[i] = from.at[i] + from.at[8 + i];
  for (size_t left = 4; left > 0; left /= 2) {
    for (size_t i = 0; i < left; ++i) sum[i] += sum[left + i];
  }
  return sum[0];
}
// The products of the odd numbers are added first, then those of the even ones; each addition rounds once, to nearest
// even. Subnormal numbers are zeros on the way in and on the way out.
GLM_EMULATED __m512 _mm512_dpbf16_ps(__m512 sum, __m512bh a, __m512bh b) {
  using emulator::flushed;
  using emulator::U32;
  const U32 x = (U32)a, y = (U32)b;
  const U32 odd = flushed((U32)emulator::fused(flushed(x & 0xffff0000u), flushed(y & 0xffff0000u), flushed((U32)sum)));
  return (__m512)flushed((U32)emulator::fused(flushed(x << 16), flushed(y << 16), odd));
}

}  // namespace glm
