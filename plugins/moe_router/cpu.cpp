#include "plugins/moe_router/attributes.h"

namespace glm {
namespace {

class MoERouter : public Kernel {
 public:
  explicit MoERouter(const Node& node) : attributes_(node) {}

  void compute(Run& run) const override {
    const Tensor logits = run.input(0), bias = run.input(1);
    logits.expect({kAny, kAny});
    const int64_t T = logits.dim(0), E = logits.dim(1), K = attributes_.top_k();
    bias.expect({E});
    RouterArguments a = attributes_.arguments(logits.as<const float>(), bias.as<const float>(), T, E, nullptr, nullptr);
    a.expert_ids = run.output(0, {T, K}).as<int32_t>();
    a.expert_weights = run.output(1, {T, K}).as<float>();
    route(a, run.parallel());
  }

 private:
  RouterAttributes attributes_;
};

const Register<MoERouter> kMoERouter{
    "MoERouter", {{"logits", kF32}, {"correction_bias", kF32}}, {{"expert_ids", kI32}, {"expert_weights", kF32}}};

}  // namespace
}  // namespace glm
