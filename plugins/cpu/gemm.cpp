#include "plugins/cpu/gemm.h"

namespace glm {

const Gemm& gemm(Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::avx512) return kGemmAvx512;
  if (isa == Isa::avx2) return kGemmAvx2;
#endif
  (void)isa;
  return kGemmScalar;
}

}  // namespace glm
