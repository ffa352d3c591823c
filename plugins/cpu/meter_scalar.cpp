#include "plugins/cpu/meter_inline.h"

namespace glm {
namespace {

// 128 bits: what every 64-bit machine has.
typedef uint64_t Words __attribute__((vector_size(16)));

struct MultiplyAdd {
  typedef float Sum __attribute__((vector_size(16)));
  using Factor = Sum;
  static constexpr size_t kFlops = 2 * 4;
  // A product that only depends on a and b would be computed once.
  static Sum add(Sum sum, Factor a, Factor b) { return sum * a + b; }
};

}  // namespace

const Meter kMeterScalar = {read_words<Words>, arithmetic<MultiplyAdd>(), {nullptr, 0}};

}  // namespace glm
