// One task computes a block of output columns for a block of rows; every weight row is read by one task per row block.
// Columns are split so that two tasks or more keep each thread busy, rows only when there are many, so that a block of
// activations stays in the second-level cache while the weights stream by.
#include "plugins/linear/linear.h"

#include <algorithm>
#include <vector>

#include "plugins/cpu/packed_rows.h"

namespace glm {
namespace {

constexpr size_t kTaskBytes = 64 << 10;         // of weights, so that dispatching a task costs little beside it
constexpr size_t kActivationBytes = 256 << 10;  // of packed rows that a task goes over again and again

}  // namespace

void linear(const LinearArguments& a, const Gemm& g, const Parallel& parallel) {
  const Form form = form_of(a.weight_type, a.x_type);
  const size_t weight_row = a.I * size_of(a.weight_type);
  const PackedRows rows(g, form, a.x_type, a.x, a.T, a.I, parallel);

  const size_t column_tasks = tasks_for(a.O * weight_row, kTaskBytes, kMostTasks);
  const size_t columns = (a.O + column_tasks - 1) / column_tasks;
  const size_t row_block = std::max<size_t>(16, kActivationBytes / rows.row_bytes());
  const size_t row_tasks = (a.T + row_block - 1) / row_block;
  parallel(column_tasks * row_tasks, [&](size_t task) {
    const size_t first = task % column_tasks * columns;
    const size_t last = std::min(a.O, first + columns);
    const size_t t_first = task / column_tasks * row_block;
    const size_t t_last = std::min(a.T, t_first + row_block);
    if (first >= last) return;
    const size_t n = last - first;
    thread_local std::vector<float> sums;
    if (sums.size() < n * (t_last - t_first)) sums.resize(n * (t_last - t_first));
    const auto* weight = static_cast<const uint8_t*>(a.weight) + first * weight_row;
    g.multiply(form, weight, n, rows.pointers() + t_first, t_last - t_first, a.I, sums.data(), n);
    for (size_t t = t_first; t < t_last; ++t) {
      float* y = sums.data() + (t - t_first) * n;
      if (a.weight_scale) {
        const float scale = rows.scale(t);
        for (size_t i = 0; i < n; ++i) y[i] *= scale * a.weight_scale[first + i];
      }
      if (a.bias) {
        for (size_t i = 0; i < n; ++i) y[i] += a.bias[first + i];
      }
      store_f32(a.x_type, y, t * a.O + first, n, a.y);
    }
  });
}

}  // namespace glm
