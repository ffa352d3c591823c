// The inputs of a node that attends, checked.
#pragma once

#include "plugins/cached_attention/attention.h"
#include "plugins/cpu/op.h"

namespace glm {

class AttentionOperands {
 public:
  // How many inputs they are, from the first on, and which.
  static constexpr size_t kCount = 9;
  static std::vector<Operand> inputs();

  AttentionOperands(const Run& run, int64_t rotary_dim);

  int64_t B() const { return q.dim(0); }
  int64_t S() const { return q.dim(1); }
  int64_t H() const { return q.dim(2); }
  int64_t A() const { return q.dim(3); }
  int64_t J() const { return k_cache.dim(1); }
  int64_t C() const { return k_cache.dim(2); }

  // What is to be computed. Where there are no new tokens there is nothing; the caches are only copied.
  CachedAttention attention(float scale, void* out, const Tensor& k_cache_out, const Tensor& v_cache_out,
                            float* attentions) const;
  void copy_caches(const Tensor& k_cache_out, const Tensor& v_cache_out) const;

  const Tensor q, k, v, cos, sin, k_cache, v_cache, write_index, length;
};

// The attributes of such a node.
struct AttentionAttributes {
  explicit AttentionAttributes(const Node& node);
  int64_t rotary_dim;
  float scale;
};

}  // namespace glm
