// One task normalizes some rows: once over a row for its sum of squares, once more for the result.
// Rows are split evenly; a row stays whole.
// Sixteen partial sums, because a single one can not be vectorized; the second pass finds the row in the cache.
#include <cmath>

#include "plugins/cpu/op.h"
#include "plugins/cpu/rows.h"

namespace glm {
namespace {

constexpr size_t kLanes = 16;

float sum_of_squares(Type type, const void* x, size_t begin, size_t D) {
  float buffer[kTile], lanes[kLanes] = {};
  for (size_t start = 0; start < D; start += kTile) {
    const size_t count = std::min(kTile, D - start);
    const float* values = load_f32(type, x, begin + start, count, buffer);
    size_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
      for (size_t lane = 0; lane < kLanes; ++lane) lanes[lane] += values[i + lane] * values[i + lane];
    }
    for (; i < count; ++i) lanes[i % kLanes] += values[i] * values[i];
  }
  for (size_t half = kLanes / 2; half > 0; half /= 2) {
    for (size_t lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  }
  return lanes[0];
}

class RmsNorm : public Kernel {
 public:
  explicit RmsNorm(const Node& node) : epsilon_(node.real("epsilon")) {}

  void compute(Run& run) const override {
    const Tensor x = run.input(0), weight = run.input(1);
    const size_t D = static_cast<size_t>(x.dim(-1));
    weight.expect({x.dim(-1)});
    const Tensor y = run.output(0, x.shape());
    split(run.parallel(), static_cast<size_t>(x.rows()), D, [&](size_t begin, size_t end) {
      float buffer[kTile], result[kTile];
      for (size_t row = begin; row < end; ++row) {
        const float mean = sum_of_squares(x.type(), x.data(), row * D, D) / static_cast<float>(D);
        const float factor = 1.0f / std::sqrt(mean + epsilon_);
        for (size_t start = 0; start < D; start += kTile) {
          const size_t count = std::min(kTile, D - start);
          const float* values = load_f32(x.type(), x.data(), row * D + start, count, buffer);
          const float* w = weight.as<const float>() + start;
          for (size_t i = 0; i < count; ++i) result[i] = values[i] * factor * w[i];
          store_f32(y.type(), result, row * D + start, count, y.data());
        }
      }
    });
  }

 private:
  float epsilon_;
};

const Register<RmsNorm> kRmsNorm{"RMSNorm", {{"x", kCompute}, {"weight", kF32}}, {{"y", kCompute, "x"}}};

}  // namespace
}  // namespace glm
