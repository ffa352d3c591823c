// From the projections of q, k and v to the norm after attention, in one node: attention, its output projection, the
// sum with the residual stream and the norm. Every value is rounded where the ops it stands for round it.
#include "plugins/cached_attention/operands.h"
#include "plugins/linear/operands.h"
#include "plugins/rms_norm/add_rms_norm.h"

namespace glm {
namespace {

// AttentionBlock (with_scale false) and FP8AttentionBlock.
template <bool with_scale>
class AttentionBlockKernel : public Kernel {
 public:
  explicit AttentionBlockKernel(const Node& node)
      : attributes_(node), epsilon_(node.real("epsilon")), isa_(isa()), gemm_(gemm(isa_)) {}

  void compute(Run& run) const override {
    constexpr size_t kNext = AttentionOperands::kCount + LinearOperands::count(with_scale);
    const AttentionOperands in(run, attributes_.rotary_dim);
    const int64_t HA = in.H() * in.A();
    const LinearOperands o(run, AttentionOperands::kCount, with_scale, HA);
    const Tensor residual = run.input(kNext), norm = run.input(kNext + 1);
    const int64_t D = o.out_size();
    residual.expect({in.B(), in.S(), D});
    norm.expect({D});
    const AddRmsNorm add_norm{residual, norm, run.output(0, residual.shape()), run.output(1, residual.shape()),
                              epsilon_};
    const Tensor k_cache_out = run.output(2, in.k_cache.shape()), v_cache_out = run.output(3, in.v_cache.shape());
    const size_t T = static_cast<size_t>(in.B() * in.S());
    if (T == 0) return in.copy_caches(k_cache_out, v_cache_out);

    const auto bytes = [&](int64_t width) {
      return whole_lines(T * static_cast<size_t>(width) * size_of(in.q.type()));
    };
    const size_t rest = in.attention(0, nullptr, k_cache_out, v_cache_out, nullptr).scratch_bytes(isa_);
    auto* out = static_cast<uint8_t*>(run.scratch(bytes(HA) + bytes(D) + rest));
    uint8_t* update = out + bytes(HA);
    Flow flow;
    const Flow::Done attended =
        in.attention(attributes_.scale, out, k_cache_out, v_cache_out, nullptr).add(flow, isa_, update + bytes(D), 0);
    LinearPart part = o.part(residual);
    part.y = update;
    thread_local PackedRows packed;
    const Flow::Done projected = add_linear(
        flow, {in.q.type(), out, o.type(), in.q.type(), T, static_cast<size_t>(HA), &part, 1}, gemm_, packed, attended);
    add_norm.add(flow, update, 0, T, projected);
    flow.run(run.parallel());
  }

 private:
  AttentionAttributes attributes_;
  float epsilon_;
  Isa isa_;
  const Gemm& gemm_;
};

std::vector<Operand> inputs(bool with_scale) {
  std::vector<Operand> all = AttentionOperands::inputs();
  if (with_scale) {
    all.insert(all.end(), {{"o_weight", kE4m3}, {"o_scale", kF32}});
  } else {
    all.push_back({"o_weight", kCompute, "q"});
  }
  all.insert(all.end(), {{"o_bias", kF32, nullptr, true}, {"residual", kCompute, "q"}, {"norm_weight", kF32}});
  return all;
}

const std::vector<Operand> kOutputs{{"sum", kCompute, "q"},
                                    {"y", kCompute, "q"},
                                    {"k_cache_out", kCompute, "k_cache"},
                                    {"v_cache_out", kCompute, "k_cache"}};

const Register<AttentionBlockKernel<false>> kAttentionBlock{"AttentionBlock", inputs(false), kOutputs};
const Register<AttentionBlockKernel<true>> kFp8AttentionBlock{"FP8AttentionBlock", inputs(true), kOutputs};

}  // namespace
}  // namespace glm
