// One task adds and normalizes some rows. A row's rounded sum is still in the cache when it is normalized.
#include "plugins/cpu/op.h"
#include "plugins/residual_add/residual_add.h"
#include "plugins/rms_norm/rms_norm.h"

namespace glm {
namespace {

class AddRmsNorm : public Kernel {
 public:
  explicit AddRmsNorm(const Node& node) : epsilon_(node.real("epsilon")) {}

  void compute(Run& run) const override {
    const Tensor x = run.input(0), update = run.input(1), weight = run.input(2);
    weight.expect({kPositive});
    x.expect_rows_of(weight.dim(0));
    update.expect(x.shape());
    const size_t D = static_cast<size_t>(weight.dim(0));
    const Tensor sum = run.output(0, x.shape()), y = run.output(1, x.shape());
    split(run.parallel(), static_cast<size_t>(x.rows()), D, [&](size_t begin, size_t end) {
      for (size_t row = begin; row < end; ++row) {
        residual_add(x.type(), x.data(), update.type(), update.data(), row * D, (row + 1) * D, sum.data());
        rms_norm_row(x.type(), sum.data(), weight.as<const float>(), epsilon_, row, D, y.data());
      }
    });
  }

 private:
  float epsilon_;
};

const Register<AddRmsNorm> kAddRmsNorm{"AddRMSNorm",
                                       {{"x", kCompute}, {"update", kCompute, "x"}, {"weight", kF32}},
                                       {{"sum", kCompute, "x"}, {"y", kCompute, "x"}}};

}  // namespace
}  // namespace glm
