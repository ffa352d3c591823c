// One task computes a run of elements, tile by tile.
// Elements are split evenly, whatever the rows.
// The sigmoid is an exponential of a few units in the last place and a division, both relative however small it is.
#include "plugins/cpu/gemm.h"
#include "plugins/cpu/op.h"
#include "plugins/cpu/rows.h"

namespace glm {
namespace {

class SiluMul : public Kernel {
 public:
  explicit SiluMul(const Node&) : gemm_(gemm(isa())) {}

  void compute(Run& run) const override {
    const Tensor gate = run.input(0), up = run.input(1);
    up.expect(gate.shape());
    const Tensor y = run.output(0, gate.shape());
    split(run.parallel(), static_cast<size_t>(gate.size()), 1, [&](size_t begin, size_t end) {
      float gate_buffer[kTile], up_buffer[kTile], product[kTile];
      for (size_t start = begin; start < end; start += kTile) {
        const size_t count = std::min(kTile, end - start);
        const float* a = load_f32(gate.type(), gate.data(), start, count, gate_buffer);
        const float* b = load_f32(up.type(), up.data(), start, count, up_buffer);
        gemm_.silu_mul(a, b, count, product);
        store_f32(y.type(), product, start, count, y.data());
      }
    });
  }

 private:
  const Gemm& gemm_;
};

const Register<SiluMul> kSiluMul{"SiluMul", {{"gate", kCompute}, {"up", kCompute}}, {{"y", kCompute, "gate"}}};

}  // namespace
}  // namespace glm
