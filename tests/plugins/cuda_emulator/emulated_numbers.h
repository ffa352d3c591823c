// The element types of plugins/cuda/device.cuh and their conversions, from the formats' definitions: nothing is shared
// with the kernels of this project.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace glm {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};
struct e4m3 {
  uint8_t bits;
};

inline unsigned bits_of(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float float_of(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

namespace emulator {

// A binary format: sign, exponent, mantissa of `fraction` bits.
struct Format {
  int fraction, least_exponent;
  float greatest;
  unsigned infinity, nan, sign;  // their bits; E4M3 saturates instead of being infinite
};
constexpr Format kF16{10, -14, 65504.0f, 0x7c00, 0x7e00, 0x8000};
constexpr Format kE4m3{3, -6, 448.0f, 0x7e, 0x7f, 0x80};

inline unsigned encode(const Format& format, float x) {
  if (std::isnan(x)) return format.nan;
  const unsigned sign = std::signbit(x) ? format.sign : 0;
  const float size = std::fabs(x);
  if (std::isinf(size)) return sign | format.infinity;
  const int exponent = size == 0 ? format.least_exponent : std::max(std::ilogb(size), format.least_exponent);
  const double last_place = std::ldexp(1.0, exponent - format.fraction);
  const double units = std::nearbyint(size / last_place);  // ties to even
  if (units * last_place > format.greatest) return sign | format.infinity;
  // A carry into the next power of two is what adding to the exponent's bits makes of it.
  const auto exponent_bits = static_cast<unsigned>(exponent - format.least_exponent) << format.fraction;
  return sign | (exponent_bits + static_cast<unsigned>(units));
}

inline float decode(const Format& format, unsigned bits) {
  const unsigned magnitude = bits & (format.sign - 1);
  const float sign = bits & format.sign ? -1.0f : 1.0f;
  if (format.greatest == 448.0f ? magnitude == format.nan : magnitude > format.infinity) return NAN;
  if (format.greatest != 448.0f && magnitude == format.infinity) return sign * INFINITY;
  const unsigned fraction = magnitude & ((1u << format.fraction) - 1);
  const int exponent = static_cast<int>(magnitude >> format.fraction);
  const int normal = exponent > 0;
  const auto units = static_cast<float>(fraction + (static_cast<unsigned>(normal) << format.fraction));
  return sign * std::ldexp(units, format.least_exponent + exponent - normal - format.fraction);
}

}  // namespace emulator

inline float to_f32(float x) { return x; }
inline float to_f32(bf16 x) { return float_of(static_cast<unsigned>(x.bits) << 16); }
inline float to_f32(f16 x) { return emulator::decode(emulator::kF16, x.bits); }
inline float to_f32(e4m3 x) { return emulator::decode(emulator::kE4m3, x.bits); }

template <class T>
T round_to(float x) {
  if constexpr (std::is_same_v<T, float>) {
    return x;
  } else if constexpr (std::is_same_v<T, bf16>) {
    if (std::isnan(x)) return {0x7fff};
    const unsigned bits = bits_of(x);
    return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
  } else if constexpr (std::is_same_v<T, f16>) {
    return {static_cast<uint16_t>(emulator::encode(emulator::kF16, x))};
  } else {
    static_assert(std::is_same_v<T, e4m3>);
    return {static_cast<uint8_t>(emulator::encode(emulator::kE4m3, x))};
  }
}

inline uint16_t round_to_e4m3x2(float first, float second) {
  return static_cast<uint16_t>(round_to<e4m3>(first).bits | round_to<e4m3>(second).bits << 8);
}
inline unsigned e4m3x2_to_f16x2(uint16_t x) {
  const auto one = [](unsigned byte) {
    return emulator::encode(emulator::kF16, emulator::decode(emulator::kE4m3, byte));
  };
  return one(x & 0xffu) | one(x >> 8) << 16;
}

}  // namespace glm
