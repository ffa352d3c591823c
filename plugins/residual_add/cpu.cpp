// One task adds a run of elements, tile by tile.
// Elements are split evenly, whatever the rows.
// A sum per eight bytes or so: only the memory rate matters, and a decode step's few thousand stay in one task.
#include "plugins/cpu/op.h"
#include "plugins/residual_add/residual_add.h"

namespace glm {
namespace {

class ResidualAdd : public Kernel {
 public:
  explicit ResidualAdd(const Node&) {}

  void compute(Run& run) const override {
    const Tensor x = run.input(0), update = run.input(1);
    update.expect(x.shape());
    const Tensor y = run.output(0, x.shape());
    split(run.parallel(), static_cast<size_t>(x.size()), 1, [&](size_t begin, size_t end) {
      residual_add(x.type(), x.data(), update.type(), update.data(), begin, end, y.data());
    });
  }
};

const Register<ResidualAdd> kResidualAdd{
    "ResidualAdd", {{"x", kCompute}, {"update", kCompute}}, {{"y", kCompute, "x"}}};

}  // namespace
}  // namespace glm
