// CachedAttention without any instruction set beyond what the compiler assumes: vectors of four.
#include "plugins/cached_attention/attention_tile.h"

namespace glm {

const AttentionLoops& attention_scalar(Type type) {
  static constexpr AttentionLoops kF32 = float_loops<float, float, 4, 2, 4, 4>();
  static constexpr AttentionLoops kBf16 = float_loops<Bf16, float, 4, 2, 4, 4>();
  static constexpr AttentionLoops kF16 = float_loops<F16, float, 4, 2, 4, 4>();
  return type == Type::f32 ? kF32 : type == Type::bf16 ? kBf16 : kF16;
}

}  // namespace glm
