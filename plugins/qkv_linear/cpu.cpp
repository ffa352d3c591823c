#include "plugins/linear/operands.h"

namespace glm {
namespace {

// QkvLinear (with_scale false) and FP8QkvLinear.
template <bool with_scale>
class QkvLinearKernel : public Kernel {
 public:
  explicit QkvLinearKernel(const Node& node) : A_(node.integer("head_size")), gemm_(gemm(isa())) {
    if (A_ < 1) throw Error("head_size is " + std::to_string(A_) + ", expected 1 or more.");
  }

  void compute(Run& run) const override {
    const Tensor x = run.input(0);
    constexpr size_t kCount = LinearOperands::count(with_scale);
    const LinearOperands q(run, 1, with_scale);
    const int64_t D = q.width();
    const LinearOperands k(run, 1 + kCount, with_scale, D), v(run, 1 + 2 * kCount, with_scale, D);
    x.expect({kAny, kAny, D});
    const LinearPart parts[] = {part(run, 0, x, q), part(run, 1, x, k), part(run, 2, x, v)};
    linear({x.type(), x.data(), q.type(), x.type(), static_cast<size_t>(x.rows()), static_cast<size_t>(D), parts, 3},
           gemm_, run.parallel());
  }

 private:
  LinearPart part(Run& run, size_t output, const Tensor& x, const LinearOperands& weight) const {
    const int64_t rows = weight.out_size();
    if (rows % A_ != 0) {
      throw Error("there are " + std::to_string(rows) + " rows of a weight: head_size = " + std::to_string(A_) +
                  " must divide them.");
    }
    return weight.part(run.output(output, {x.dim(0), x.dim(1), rows / A_, A_}));
  }

  int64_t A_;
  const Gemm& gemm_;
};

const std::vector<Operand> kOutputs{{"q", kCompute, "x"}, {"k", kCompute, "x"}, {"v", kCompute, "x"}};

const Register<QkvLinearKernel<false>> kQkvLinear{"QkvLinear",
                                                  {{"x", kCompute},
                                                   {"q_weight", kCompute, "x"},
                                                   {"q_bias", kF32, nullptr, true},
                                                   {"k_weight", kCompute, "x"},
                                                   {"k_bias", kF32, nullptr, true},
                                                   {"v_weight", kCompute, "x"},
                                                   {"v_bias", kF32, nullptr, true}},
                                                  kOutputs};

const Register<QkvLinearKernel<true>> kFp8QkvLinear{"FP8QkvLinear",
                                                    {{"x", kCompute},
                                                     {"q_weight", kE4m3},
                                                     {"q_scale", kF32},
                                                     {"q_bias", kF32, nullptr, true},
                                                     {"k_weight", kE4m3},
                                                     {"k_scale", kF32},
                                                     {"k_bias", kF32, nullptr, true},
                                                     {"v_weight", kE4m3},
                                                     {"v_scale", kF32},
                                                     {"v_bias", kF32, nullptr, true}},
                                                    kOutputs};

}  // namespace
}  // namespace glm
