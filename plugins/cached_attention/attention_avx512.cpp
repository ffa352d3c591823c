// CachedAttention with AVX-512: vectors of sixteen, and 32 registers for the sums.
#include "plugins/cached_attention/attention_tile.h"

namespace glm {

const AttentionLoops& attention_avx512(Type cache) {
  static constexpr AttentionLoops kF32 = attention_loops<float, 16, 14, 2>();
  static constexpr AttentionLoops kBf16 = attention_loops<Bf16, 16, 14, 2>();
  static constexpr AttentionLoops kF16 = attention_loops<F16, 16, 14, 2>();
  return cache == Type::f32 ? kF32 : cache == Type::bf16 ? kBf16 : kF16;
}

}  // namespace glm
