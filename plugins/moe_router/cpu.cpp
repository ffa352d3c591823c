// One task routes some tokens: scores, group scores, then the best experts of the best groups by insertion.
// Tokens are split evenly.
// Going through candidates in order and moving up only what is strictly better gives ties to the lowest id.
#include <limits>

#include "plugins/cpu/op.h"
#include "plugins/cpu/rows.h"

namespace glm {
namespace {

// The k best candidates seen so far, best first.
class Best {
 public:
  explicit Best(size_t k) : values_(k), ids_(k) {}

  void clear() { count_ = 0; }

  void offer(float value, int32_t id) {
    if (count_ == values_.size() && !(value > values_[count_ - 1])) return;
    size_t at = count_ < values_.size() ? count_++ : count_ - 1;
    for (; at > 0 && value > values_[at - 1]; --at) {
      values_[at] = values_[at - 1];
      ids_[at] = ids_[at - 1];
    }
    values_[at] = value;
    ids_[at] = id;
  }

  const std::vector<int32_t>& ids() const { return ids_; }

 private:
  std::vector<float> values_;
  std::vector<int32_t> ids_;
  size_t count_ = 0;
};

class MoERouter : public Kernel {
 public:
  explicit MoERouter(const Node& node)
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

  void compute(Run& run) const override {
    const Tensor logits = run.input(0), bias = run.input(1);
    logits.expect({-1, -1});
    const int64_t T = logits.dim(0), E = logits.dim(1);
    bias.expect({E});
    if (E < K_ || E % G_ != 0) {
      throw Error("there are " + std::to_string(E) + " experts: n_group = " + std::to_string(G_) +
                  " must divide them and top_k = " + std::to_string(K_) + " not exceed them.");
    }
    const Tensor ids = run.output(0, {T, K_}), weights = run.output(1, {T, K_});
    split(run.parallel(), static_cast<size_t>(T), static_cast<size_t>(E), [&](size_t begin, size_t end) {
      const size_t K = static_cast<size_t>(K_);
      std::vector<float> score(static_cast<size_t>(E)), choice(static_cast<size_t>(E));
      Best groups(static_cast<size_t>(topk_group_)), experts(K);
      for (size_t t = begin; t < end; ++t) {
        const float* row = logits.as<const float>() + t * score.size();
        for (size_t e = 0; e < score.size(); ++e) score[e] = sigmoid_f32(row[e]);
        for (size_t e = 0; e < score.size(); ++e) choice[e] = score[e] + bias.as<const float>()[e];
        if (topk_group_ < G_) mask(choice, groups);
        experts.clear();
        for (size_t e = 0; e < score.size(); ++e) experts.offer(choice[e], static_cast<int32_t>(e));
        weigh(score, experts.ids(), ids.as<int32_t>() + t * K, weights.as<float>() + t * K);
      }
    });
  }

 private:
  // Sets the choice of every expert outside the best groups to minus infinity.
  void mask(std::vector<float>& choice, Best& groups) const {
    constexpr float kNever = -std::numeric_limits<float>::infinity();
    const size_t G = static_cast<size_t>(G_), size = choice.size() / G;
    groups.clear();
    for (size_t g = 0; g < G; ++g) {
      float best = kNever, second = kNever;
      for (size_t e = g * size; e < (g + 1) * size; ++e) {
        second = std::max(second, std::min(best, choice[e]));
        best = std::max(best, choice[e]);
      }
      groups.offer(size > 1 ? best + second : best, static_cast<int32_t>(g));
    }
    const std::vector<int32_t>& kept = groups.ids();
    for (size_t g = 0; g < G; ++g) {
      if (std::find(kept.begin(), kept.end(), static_cast<int32_t>(g)) != kept.end()) continue;
      std::fill_n(choice.begin() + static_cast<ptrdiff_t>(g * size), size, kNever);
    }
  }

  void weigh(const std::vector<float>& score, const std::vector<int32_t>& chosen, int32_t* ids, float* weights) const {
    float sum = 0;
    for (int32_t e : chosen) sum += score[static_cast<size_t>(e)];
    const float denominator = normalize_ ? sum + 1e-20f : 1.0f;
    for (size_t k = 0; k < chosen.size(); ++k) {
      ids[k] = chosen[k];
      weights[k] = score[static_cast<size_t>(chosen[k])] / denominator * scaling_;
    }
  }

  int64_t K_, G_, topk_group_;
  bool normalize_;
  float scaling_;
};

const Register<MoERouter> kMoERouter{
    "MoERouter", {{"logits", kF32}, {"correction_bias", kF32}}, {{"expert_ids", kI32}, {"expert_weights", kF32}}};

}  // namespace
}  // namespace glm
