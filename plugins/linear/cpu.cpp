#include "plugins/linear/operands.h"

namespace glm {
namespace {

// Linear (with_scale false) and FP8Linear.
template <bool with_scale>
class LinearKernel : public Kernel {
 public:
  explicit LinearKernel(const Node&) : gemm_(gemm(isa())) {}

  void compute(Run& run) const override {
    const Tensor x = run.input(0);
    const LinearOperands weight(run, 1, with_scale);
    x.expect_rows_of(weight.width());
    std::vector<int64_t> shape(x.shape().begin(), x.shape().end());
    shape.back() = weight.out_size();
    const LinearPart part = weight.part(run.output(0, {shape.data(), shape.size()}));
    linear({x.type(), x.data(), weight.type(), x.type(), static_cast<size_t>(x.rows()),
            static_cast<size_t>(weight.width()), &part, 1},
           gemm_, run.parallel());
  }

 private:
  const Gemm& gemm_;
};

const Register<LinearKernel<false>> kLinear{
    "Linear", {{"x", kCompute}, {"weight", kCompute}, {"bias", kF32, nullptr, true}}, {{"y", kCompute, "x"}}};

const Register<LinearKernel<true>> kFp8Linear{
    "FP8Linear",
    {{"x", kCompute}, {"weight", kE4m3}, {"weight_scale", kF32}, {"bias", kF32, nullptr, true}},
    {{"y", kCompute, "x"}}};

}  // namespace
}  // namespace glm
