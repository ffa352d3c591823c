// The product, and whether all of it are numbers: to find that out while the logits are still in the caches of the
// threads that computed them costs a tenth of what it costs whoever asks later.
#include "plugins/cpu/op.h"
#include "plugins/cpu/rows.h"
#include "plugins/linear/operands.h"

// The logits that were last found to be finite; what runs in between may have found others.
extern "C" __attribute__((visibility("default"))) std::atomic<const void*> glm_finite_logits;
std::atomic<const void*> glm_finite_logits{nullptr};

namespace glm {
namespace {

bool all_finite(const float* x, size_t count) {
  constexpr uint32_t kExponent = 0x7f800000u;  // all of it ones: infinity or NaN
  uint32_t odd = 0;
  for (size_t i = 0; i < count; ++i) odd |= (bits_of(x[i]) & kExponent) == kExponent;
  return odd == 0;
}

// Logits (with_scale false) and FP8Logits.
template <bool with_scale>
class LogitsKernel : public Kernel {
 public:
  explicit LogitsKernel(const Node&) : gemm_(gemm(isa())) {}

  void compute(Run& run) const override {
    const Tensor x = run.input(0), weight = run.input(1), scale = with_scale ? run.input(2) : Tensor();
    weight.expect({kPositive, kPositive});
    const int64_t V = weight.dim(0), D = weight.dim(1);
    x.expect({kAny, 1, D});
    if (with_scale) scale.expect({V});
    const int64_t B = x.dim(0);
    const Tensor logits = run.output(0, {B, V});
    const auto size = [](int64_t n) { return static_cast<size_t>(n); };
    auto* wide = static_cast<float*>(run.scratch(size(B * D) * sizeof(float)));
    const LinearPart part = {weight.data(), with_scale ? scale.as<const float>() : nullptr, nullptr, size(V),
                             logits.data()};
    std::atomic<bool> finite{true};
    thread_local PackedRows packed;
    Flow flow;
    const Flow::Done multiplied = add_linear(flow,
                                             {Type::f32, load_f32(x.type(), x.data(), 0, size(B * D), wide),
                                              weight.type(), Type::f32, size(B), size(D), &part, 1},
                                             gemm_, packed, 0);
    split(flow, multiplied, size(B * V), 1, [&](size_t begin, size_t end) {
      if (!all_finite(logits.as<const float>() + begin, end - begin)) finite = false;
    });
    flow.run(run.parallel());
    glm_finite_logits = finite ? logits.data() : nullptr;
  }

 private:
  const Gemm& gemm_;
};

const Register<LogitsKernel<false>> kLogits{"Logits", {{"x", kCompute}, {"weight", kCompute, "x"}}, {{"logits", kF32}}};

const Register<LogitsKernel<true>> kFp8Logits{
    "FP8Logits", {{"x", kCompute}, {"weight", kE4m3}, {"weight_scale", kF32}}, {{"logits", kF32}}};

}  // namespace
}  // namespace glm
