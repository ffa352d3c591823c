// CachedAttention with AVX2, FMA and F16C: vectors of eight; bf16 and f16 keys and values are widened block by block.
#include "plugins/cached_attention/attention_tile.h"

namespace glm {

#if defined(__AVX2__) && defined(__FMA__)

namespace {

// One vector of lanes where that is enough for a token's heads, otherwise two.
template <class T, class V>
const AttentionLoops& loops(size_t rows) {
  static constexpr AttentionLoops kOne = float_loops<T, V, 8, 1, 8, 6>();
  static constexpr AttentionLoops kTwo = float_loops<T, V, 8, 2, 6, 6>();
  return rows <= 8 ? kOne : kTwo;
}

}  // namespace

const AttentionLoops& attention_avx2(Type type, size_t rows) {
  if (type == Type::f32) return loops<float, float>(rows);
  return type == Type::bf16 ? loops<Bf16, Bf16>(rows) : loops<F16, float>(rows);
}

#else

const AttentionLoops& attention_avx2(Type type, size_t) { return attention_scalar(type); }

#endif

}  // namespace glm
