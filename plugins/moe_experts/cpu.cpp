#include "plugins/cpu/op.h"
#include "plugins/moe_experts/experts.h"

namespace glm {
namespace {

// MoEExperts (with_scale false) and FP8MoEExperts.
template <bool with_scale>
class ExpertsKernel : public Kernel {
 public:
  explicit ExpertsKernel(const Node&) : gemm_(gemm(isa())) {}

  void compute(Run& run) const override {
    const Tensor hidden = run.input(0);
    const Tensor ids = run.input(1);
    const Tensor weights = run.input(2);
    const Tensor gate_up = run.input(3);
    const Tensor gate_up_scale = with_scale ? run.input(4) : Tensor();
    const Tensor down = run.input(with_scale ? 5 : 4);
    const Tensor down_scale = with_scale ? run.input(6) : Tensor();
    down.expect({kPositive, kPositive, kPositive});
    const int64_t E = down.dim(0), D = down.dim(1), F = down.dim(2);
    gate_up.expect({E, 2 * F, D});
    hidden.expect({kAny, D});
    ids.expect({hidden.dim(0), kPositive});
    const int64_t T = ids.dim(0), K = ids.dim(1);
    weights.expect({T, K});
    if (with_scale) {
      gate_up_scale.expect({E, 2 * F});
      down_scale.expect({E, D});
    }
    const Tensor out = run.output(0, {T, D});
    if (T == 0) return;
    work().experts +=
        experts({hidden.type(), hidden.data(), ids.as<const int32_t>(), weights.as<const float>(), gate_up.type(),
                 gate_up.data(), with_scale ? gate_up_scale.as<const float>() : nullptr, down.data(),
                 with_scale ? down_scale.as<const float>() : nullptr, static_cast<size_t>(T), static_cast<size_t>(K),
                 static_cast<size_t>(E), static_cast<size_t>(D), static_cast<size_t>(F), out.data(), nullptr},
                gemm_, run.parallel());
  }

 private:
  const Gemm& gemm_;
};

const Register<ExpertsKernel<false>> kExperts{"MoEExperts",
                                              {{"hidden", kCompute},
                                               {"expert_ids", kI32},
                                               {"expert_weights", kF32},
                                               {"gate_up", kCompute, "hidden"},
                                               {"down", kCompute, "hidden"}},
                                              {{"out", kCompute, "hidden"}}};

const Register<ExpertsKernel<true>> kFp8Experts{"FP8MoEExperts",
                                                {{"hidden", kCompute},
                                                 {"expert_ids", kI32},
                                                 {"expert_weights", kF32},
                                                 {"gate_up", kE4m3},
                                                 {"gate_up_scale", kF32},
                                                 {"down", kE4m3},
                                                 {"down_scale", kF32}},
                                                {{"out", kCompute, "hidden"}}};

}  // namespace
}  // namespace glm
