// What all forms of meter.h share, written with the compiler's vectors; an instruction set gives the width of one and
// the instruction that multiplies and adds.
#pragma once

#include <cstring>

#include "plugins/cpu/meter.h"

namespace glm {
namespace {

constexpr size_t kLineWords = 8;
constexpr size_t kPrefetchWords = 1024;  // ahead: the hardware's own prefetcher stops at the end of a 4 KiB page
constexpr size_t kSums = 12;  // independent; more than a multiplier's latency times the multipliers of a core

// Vector: one of uint64_t.
template <class Vector>
uint64_t read_words(const uint64_t* memory, size_t words) {
  constexpr size_t kVectors = 8, kWords = sizeof(Vector) / 8;
  Vector sums[kVectors] = {};
  size_t i = 0;
  for (; i + kVectors * kWords <= words; i += kVectors * kWords) {
    const uint64_t* at = memory + i;
#pragma GCC unroll 8
    for (size_t line = 0; line < kVectors * kWords; line += kLineWords) __builtin_prefetch(at + kPrefetchWords + line);
#pragma GCC unroll 8
    for (size_t v = 0; v < kVectors; ++v) {
      Vector value;
      std::memcpy(&value, at + v * kWords, sizeof value);  // it may lie anywhere
      sums[v] += value;
    }
  }
  uint64_t total = 0;
  for (; i < words; ++i) total += memory[i];
  for (const Vector& sum : sums) {
    for (size_t lane = 0; lane < kWords; ++lane) total += sum[lane];
  }
  return total;
}

// Instruction: Sum, a vector of float; Factor; kFlops per call; static Sum add(Sum, Factor, Factor).
template <class Instruction>
float multiply_and_add(size_t rounds) {
  typename Instruction::Sum sums[kSums] = {};
  // Zero, which no compiler can know: nothing is left out, overflows or becomes denormal.
  typename Instruction::Factor factor = {};
  asm volatile("" : "+m"(factor));
  const auto a = factor, b = factor;
  for (size_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 12
    for (size_t i = 0; i < kSums; ++i) sums[i] = Instruction::add(sums[i], a, b);
  }
  float total = 0;
  for (const auto& sum : sums) total += sum[0];
  return total;
}

template <class Instruction>
constexpr Arithmetic arithmetic() {
  return {multiply_and_add<Instruction>, kSums * Instruction::kFlops};
}

}  // namespace
}  // namespace glm
