// CachedAttention without any instruction set beyond what the compiler assumes: vectors of four.
#include "plugins/cached_attention/attention_tile.h"

namespace glm {

const AttentionLoops& attention_scalar(Type cache) {
  static constexpr AttentionLoops kF32 = attention_loops<float, 4, 6, 2>();
  static constexpr AttentionLoops kBf16 = attention_loops<Bf16, 4, 6, 2>();
  static constexpr AttentionLoops kF16 = attention_loops<F16, 4, 6, 2>();
  return cache == Type::f32 ? kF32 : cache == Type::bf16 ? kBf16 : kF16;
}

}  // namespace glm
