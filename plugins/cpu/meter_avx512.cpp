#include <immintrin.h>

#include "plugins/cpu/meter_inline.h"

namespace glm {
namespace {

typedef uint64_t Words __attribute__((vector_size(64)));

struct MultiplyAdd {
  using Sum = __m512;
  using Factor = __m512;
  static constexpr size_t kFlops = 2 * 16;
  static Sum add(Sum sum, Factor a, Factor b) { return _mm512_fmadd_ps(a, b, sum); }
};

struct DotBf16 {
  using Sum = __m512;
  using Factor = __m512bh;
  static constexpr size_t kFlops = 2 * 32;
  static Sum add(Sum sum, Factor a, Factor b) { return _mm512_dpbf16_ps(sum, a, b); }
};

}  // namespace

const Meter kMeterAvx512 = {read_words<Words>, arithmetic<MultiplyAdd>(), arithmetic<DotBf16>()};

}  // namespace glm
