#include <immintrin.h>

#include "plugins/cpu/meter_inline.h"

namespace glm {
namespace {

typedef uint64_t Words __attribute__((vector_size(32)));

struct MultiplyAdd {
  using Sum = __m256;
  using Factor = __m256;
  static constexpr size_t kFlops = 2 * 8;
  static Sum add(Sum sum, Factor a, Factor b) { return _mm256_fmadd_ps(a, b, sum); }
};

}  // namespace

const Meter kMeterAvx2 = {read_words<Words>, arithmetic<MultiplyAdd>(), {nullptr, 0}};

}  // namespace glm
