#include "plugins/cpu/op.h"
#include "plugins/linear/linear.h"

namespace glm {
namespace {

// Linear (with_scale false) and FP8Linear.
template <bool with_scale>
class LinearKernel : public Kernel {
 public:
  explicit LinearKernel(const Node&) : gemm_(gemm(isa())) {}

  void compute(Run& run) const override {
    const Tensor x = run.input(0);
    const Tensor weight = run.input(1);
    const Tensor scale = with_scale ? run.input(2) : Tensor();
    const Tensor bias = run.input(with_scale ? 3 : 2);
    const int64_t out_size = weight.dim(0), width = x.dim(-1);
    weight.expect({-1, width});
    if (with_scale) scale.expect({out_size});
    if (bias.present()) bias.expect({out_size});
    Dims shape = x.shape();
    shape.back() = out_size;
    const Tensor y = run.output(0, shape);
    if (x.rows() == 0) return;
    linear({x.type(), x.data(), weight.type(), weight.data(), with_scale ? scale.as<const float>() : nullptr,
            bias.present() ? bias.as<const float>() : nullptr, static_cast<size_t>(x.rows()),
            static_cast<size_t>(width), static_cast<size_t>(out_size), y.data()},
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
