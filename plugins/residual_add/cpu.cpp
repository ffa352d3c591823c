// One task adds a run of elements, tile by tile.
// Elements are split evenly, whatever the rows.
// A sum per eight bytes or so: only the memory rate matters, and a decode step's few thousand stay in one task.
#include "plugins/cpu/op.h"
#include "plugins/cpu/rows.h"

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
      float x_buffer[kTile], update_buffer[kTile], sum[kTile];
      for (size_t start = begin; start < end; start += kTile) {
        const size_t count = std::min(kTile, end - start);
        const float* a = load_f32(x.type(), x.data(), start, count, x_buffer);
        const float* b = load_f32(update.type(), update.data(), start, count, update_buffer);
        for (size_t i = 0; i < count; ++i) sum[i] = a[i] + b[i];
        store_f32(y.type(), sum, start, count, y.data());
      }
    });
  }
};

const Register<ResidualAdd> kResidualAdd{
    "ResidualAdd", {{"x", kCompute}, {"update", kCompute}}, {{"y", kCompute, "x"}}};

}  // namespace
}  // namespace glm
