// Attention alone; operands.cpp checks, attention.cpp computes.
#include "plugins/cached_attention/operands.h"

namespace glm {
namespace {

class CachedAttentionKernel : public Kernel {
 public:
  explicit CachedAttentionKernel(const Node& node) : attributes_(node), isa_(isa()) {}

  void compute(Run& run) const override {
    const AttentionOperands in(run, attributes_.rotary_dim);
    const Tensor out = run.output(0, in.q.shape());
    const Tensor k_cache_out = run.output(1, in.k_cache.shape()), v_cache_out = run.output(2, in.v_cache.shape());
    const Tensor attentions = run.output(3, {in.B(), in.H(), in.S(), in.C()});
    if (in.B() * in.S() == 0) return in.copy_caches(k_cache_out, v_cache_out);
    const CachedAttention attention = in.attention(attributes_.scale, out.data(), k_cache_out, v_cache_out,
                                                   attentions.present() ? attentions.as<float>() : nullptr);
    Flow flow;
    attention.add(flow, isa_, run.scratch(attention.scratch_bytes(isa_)), 0);
    flow.run(run.parallel());
  }

 private:
  AttentionAttributes attributes_;
  Isa isa_;
};

const Register<CachedAttentionKernel> kCachedAttention{"CachedAttention",
                                                       AttentionOperands::inputs(),
                                                       {{"out", kCompute, "q"},
                                                        {"k_cache_out", kCompute, "k_cache"},
                                                        {"v_cache_out", kCompute, "k_cache"},
                                                        {"attentions", kF32, nullptr, true}}};

}  // namespace
}  // namespace glm
