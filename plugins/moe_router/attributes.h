// The attributes of a node that routes, checked.
#pragma once

#include "plugins/cpu/op.h"
#include "plugins/moe_router/router.h"

namespace glm {

class RouterAttributes {
 public:
  explicit RouterAttributes(const Node& node)
      : K_(node.integer("top_k")),
        G_(node.integer("n_group")),
        topk_group_(node.integer("topk_group")),
        normalize_(node.integer("norm_topk_prob") != 0),
        scaling_(node.real("routed_scaling_factor")) {
    if (K_ < 1) throw Error("top_k is " + std::to_string(K_) + ", expected 1 or more.");
    if (topk_group_ < 1 || topk_group_ > G_) {
      throw Error("topk_group is " + std::to_string(topk_group_) + ", expected 1 to n_group = " + std::to_string(G_) +
                  ".");
    }
  }

  int64_t top_k() const { return K_; }

  // Throws Error if E experts can not be routed to like this.
  RouterArguments arguments(const float* logits, const float* bias, int64_t T, int64_t E, int32_t* expert_ids,
                            float* expert_weights) const {
    if (E < K_ || E % G_ != 0) {
      throw Error("there are " + std::to_string(E) + " experts: n_group = " + std::to_string(G_) +
                  " must divide them and top_k = " + std::to_string(K_) + " not exceed them.");
    }
    const auto size = [](int64_t n) { return static_cast<size_t>(n); };
    return {logits,     bias,     size(T),    size(E),       size(K_), size(G_), size(topk_group_),
            normalize_, scaling_, expert_ids, expert_weights};
  }

 private:
  int64_t K_, G_, topk_group_;
  bool normalize_;
  float scaling_;
};

}  // namespace glm
