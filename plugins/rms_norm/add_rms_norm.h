// How every block ends: its result is added to the residual stream, and the sum normalized for the block that follows.
#pragma once

#include "plugins/cpu/op.h"
#include "plugins/residual_add/residual_add.h"
#include "plugins/rms_norm/rms_norm.h"

namespace glm {
namespace {

// The operands of that for a result of some rows.
struct AddRmsNorm {
  Tensor residual, weight;  // [T, D], [D]
  Tensor sum, y;            // [T, D]
  float epsilon;

  // Adds the stage for the rows first .. first + count to a flow, which is to run before this ends. `update` [T, D], of
  // the type of the residual, is there when `needs` is done. A row's rounded sum is still in the cache when it is
  // normalized.
  void add(Flow& flow, const void* update, size_t first, size_t count, Flow::Done needs) const {
    const size_t D = static_cast<size_t>(weight.dim(0));
    split(flow, needs, count, D, [this, update, first, D](size_t begin, size_t end) {
      for (size_t row = first + begin; row < first + end; ++row) {
        residual_add(residual.type(), residual.data(), residual.type(), update, row * D, (row + 1) * D, sum.data());
        rms_norm_row(residual.type(), sum.data(), weight.as<const float>(), epsilon, row, D, y.data());
      }
    });
  }
};

}  // namespace
}  // namespace glm
