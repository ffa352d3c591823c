#include "plugins/silu_mul/silu_mul_inline.h"

namespace glm {

void silu_mul_avx512(const SiluMulTensors& tensors, size_t begin, size_t end) { silu_mul(tensors, begin, end); }

}  // namespace glm
