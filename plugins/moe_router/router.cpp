// One task routes some tokens: scores, group scores, then the best experts of the best groups by insertion.
// Tokens are split evenly.
// Going through candidates in order and moving up only what is strictly better gives ties to the lowest id.
#include "plugins/moe_router/router.h"

#include <algorithm>
#include <limits>
#include <vector>

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

// Sets the choice of every expert outside the best groups to minus infinity.
void mask(std::vector<float>& choice, size_t G, Best& groups) {
  constexpr float kNever = -std::numeric_limits<float>::infinity();
  const size_t size = choice.size() / G;
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

// The tokens begin .. end.
void route_some(const RouterArguments& a, size_t begin, size_t end) {
  std::vector<float> score(a.E), choice(a.E);
  Best groups(a.topk_group), experts(a.K);
  for (size_t t = begin; t < end; ++t) {
    const float* row = a.logits + t * a.E;
    for (size_t e = 0; e < a.E; ++e) score[e] = sigmoid_f32(row[e]);
    for (size_t e = 0; e < a.E; ++e) choice[e] = score[e] + a.bias[e];
    if (a.topk_group < a.G) mask(choice, a.G, groups);
    experts.clear();
    for (size_t e = 0; e < a.E; ++e) experts.offer(choice[e], static_cast<int32_t>(e));
    float sum = 0;
    for (int32_t e : experts.ids()) sum += score[static_cast<size_t>(e)];
    const float denominator = a.normalize ? sum + 1e-20f : 1.0f;
    for (size_t k = 0; k < a.K; ++k) {
      const int32_t e = experts.ids()[k];
      a.expert_ids[t * a.K + k] = e;
      a.expert_weights[t * a.K + k] = score[static_cast<size_t>(e)] / denominator * a.scaling;
    }
  }
}

}  // namespace

Flow::Done add_route(Flow& flow, const RouterArguments& a, Flow::Done needs) {
  return split(flow, needs, a.T, a.E, [=](size_t begin, size_t end) { route_some(a, begin, end); });
}

void route(const RouterArguments& a, const Parallel& parallel) {
  Flow flow;
  add_route(flow, a, 0);
  flow.run(parallel);
}

}  // namespace glm
