// CachedAttention with AVX2, FMA and F16C: vectors of eight.
#include "plugins/cached_attention/attention_tile.h"

namespace glm {

#if defined(__AVX2__) && defined(__FMA__)

const AttentionLoops& attention_avx2(Type cache) {
  static constexpr AttentionLoops kF32 = attention_loops<float, 8, 6, 2>();
  static constexpr AttentionLoops kBf16 = attention_loops<Bf16, 8, 4, 3>();
  static constexpr AttentionLoops kF16 = attention_loops<F16, 8, 4, 3>();
  return cache == Type::f32 ? kF32 : cache == Type::bf16 ? kBf16 : kF16;
}

#else

const AttentionLoops& attention_avx2(Type cache) { return attention_scalar(cache); }

#endif

}  // namespace glm
