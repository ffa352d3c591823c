// One task computes a run of elements, tile by tile.
// Elements are split evenly, whatever the rows.
// The sigmoid is an exponential of a few units in the last place and a division, both relative however small it is.
#include "plugins/cpu/op.h"
#include "plugins/cpu/rows.h"
#include "plugins/silu_mul/silu_mul.h"

namespace glm {
namespace {

class SiluMul : public Kernel {
 public:
  explicit SiluMul(const Node&) {
#if defined(__x86_64__)
    const Isa best = isa();
    if (best == Isa::avx2) function_ = silu_mul_avx2;
    if (best == Isa::avx512) function_ = silu_mul_avx512;
#endif
  }

  void compute(Run& run) const override {
    const Tensor gate = run.input(0), up = run.input(1);
    up.expect(gate.shape());
    const Tensor y = run.output(0, gate.shape());
    const SiluMulTensors tensors{gate.type(), up.type(), y.type(), gate.data(), up.data(), y.data()};
    split(run.parallel(), static_cast<size_t>(gate.size()), 1,
          [&](size_t begin, size_t end) { function_(tensors, begin, end); });
  }

 private:
  void (*function_)(const SiluMulTensors&, size_t, size_t) = silu_mul_scalar;
};

const Register<SiluMul> kSiluMul{"SiluMul", {{"gate", kCompute}, {"up", kCompute}}, {{"y", kCompute, "gate"}}};

}  // namespace
}  // namespace glm
