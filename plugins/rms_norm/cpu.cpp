// One task normalizes some rows. Rows are split evenly; a row stays whole.
#include "plugins/cpu/op.h"
#include "plugins/rms_norm/rms_norm.h"

namespace glm {
namespace {

class RmsNorm : public Kernel {
 public:
  explicit RmsNorm(const Node& node) : epsilon_(node.real("epsilon")) {}

  void compute(Run& run) const override {
    const Tensor x = run.input(0), weight = run.input(1);
    weight.expect({kPositive});
    x.expect_rows_of(weight.dim(0));
    const size_t D = static_cast<size_t>(weight.dim(0));
    const Tensor y = run.output(0, x.shape());
    split(run.parallel(), static_cast<size_t>(x.rows()), D, [&](size_t begin, size_t end) {
      for (size_t row = begin; row < end; ++row) {
        rms_norm_row(x.type(), x.data(), weight.as<const float>(), epsilon_, row, D, y.data());
      }
    });
  }

 private:
  float epsilon_;
};

const Register<RmsNorm> kRmsNorm{"RMSNorm", {{"x", kCompute}, {"weight", kF32}}, {{"y", kCompute, "x"}}};

}  // namespace
}  // namespace glm
