// One task computes a block of output columns of one part for a block of rows; every weight row is read by one task per
// row block. The tasks of all parts are handed out together.
#include "plugins/linear/linear.h"

#include <algorithm>
#include <vector>

namespace glm {
namespace {

// y of a part for the weight rows [first, last) and the rows [t_first, t_last) of x.
void block(const LinearArguments& a, const LinearPart& part, const Gemm& g, Form form, const PackedRows& rows,
           size_t first, size_t last, size_t t_first, size_t t_last) {
  const size_t n = last - first;
  thread_local std::vector<float> sums;
  if (sums.size() < n * (t_last - t_first)) sums.resize(n * (t_last - t_first));
  const auto* weight = static_cast<const uint8_t*>(part.weight) + first * a.I * size_of(a.weight_type);
  const float* bias = part.bias ? part.bias + first : nullptr;
  prefetch(bias, n);
  scaled_product(g, form, weight, part.weight_scale ? part.weight_scale + first : nullptr, n, rows.pointers() + t_first,
                 rows.scales() + t_first, t_last - t_first, a.I, sums.data());
  for (size_t t = t_first; t < t_last; ++t) {
    float* y = sums.data() + (t - t_first) * n;
    if (bias) {
      for (size_t i = 0; i < n; ++i) y[i] += bias[i];
    }
    store_f32(a.y_type, y, t * part.O + first, n, part.y);
  }
}

}  // namespace

Flow::Done add_linear(Flow& flow, const LinearArguments& a, const Gemm& g, PackedRows& rows, Flow::Done needs) {
  const Form form = form_of(a.weight_type, a.x_type);
  const Flow::Done packed = rows.pack(flow, g, form, a.x_type, a.x, a.T, a.I, needs);
  const size_t row_bytes = a.I * size_of(a.weight_type), row_tasks = ceil_div(a.T, kRowsPerTask);
  const auto columns = [=](const LinearPart& part) { return weight_rows_per_task(part.O, row_bytes, a.T); };
  const auto column_tasks = [=](const LinearPart& part) { return ceil_div(part.O, columns(part)); };
  size_t tasks = 0;
  for (size_t p = 0; p < a.part_count; ++p) tasks += column_tasks(a.parts[p]) * row_tasks;
  const auto multiply = [=, &g, &rows](size_t task) {
    const LinearPart* part = a.parts;
    for (; task >= column_tasks(*part) * row_tasks; ++part) task -= column_tasks(*part) * row_tasks;
    const size_t first = task % column_tasks(*part) * columns(*part);
    const size_t t_first = task / column_tasks(*part) * kRowsPerTask;
    block(a, *part, g, form, rows, first, std::min(part->O, first + columns(*part)), t_first,
          std::min(a.T, t_first + kRowsPerTask));
  };
  return flow.stage({tasks, packed, multiply});
}

void linear(const LinearArguments& a, const Gemm& g, const Parallel& parallel) {
  thread_local PackedRows packed;
  Flow flow;
  add_linear(flow, a, g, packed, 0);
  flow.run(parallel);
}

}  // namespace glm
