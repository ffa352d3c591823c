// What a machine can do: the loops of a meter of memory bandwidth and arithmetic, one table per instruction set.
#pragma once

#include "plugins/cpu/kernel.h"

namespace glm {

// So many products and sums at a time, none of which waits for another.
struct Arithmetic {
  float (*run)(size_t rounds);  // the result only keeps the compiler from leaving it all out
  size_t flops;                 // per round; 0 where there is no such instruction
};

struct Meter {
  // The wrapping sum of `words` 64-bit words, read in order and prefetched.
  uint64_t (*read)(const uint64_t* memory, size_t words);
  Arithmetic f32;   // fused multiply-add where there is one, else a product and a sum
  Arithmetic bf16;  // dot products of pairs, summed in float32 (vdpbf16ps)
};

extern const Meter kMeterScalar;
extern const Meter kMeterAvx2;
extern const Meter kMeterAvx512;

}  // namespace glm
