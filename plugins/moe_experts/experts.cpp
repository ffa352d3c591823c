// Tokens are sorted by expert. Stage one: a task computes a block of silu(gate) * up columns for one expert's tokens.
// Stage two: a task computes a block of output columns, going over all chosen experts in ascending order, so that a
// token's sum has one order whatever the number of threads. Each chosen expert's weights are read once per stage and
// row block.
#include "plugins/moe_experts/experts.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "plugins/cpu/packed_rows.h"

namespace glm {
namespace {

constexpr size_t kTaskBytes = 64 << 10;  // of weights
constexpr size_t kRowBlock = 64;         // tokens whose activations stay in the second-level cache

// A run of assignments (token, slot) of one expert, at most kRowBlock long.
struct Run {
  size_t expert, begin, end;
};

struct Assignments {
  std::vector<size_t> token;  // by position in the sorted order
  std::vector<float> weight;
  std::vector<Run> runs;
};

Assignments sort_by_expert(const ExpertsArguments& a) {
  std::vector<size_t> start(a.E + 1, 0);
  for (size_t i = 0; i < a.T * a.K; ++i) {
    const int32_t e = a.expert_ids[i];
    if (e < 0 || static_cast<size_t>(e) >= a.E) {
      throw std::invalid_argument("expert id " + std::to_string(e) + " is not in 0.." + std::to_string(a.E - 1));
    }
    ++start[e + 1];
  }
  for (size_t e = 0; e < a.E; ++e) start[e + 1] += start[e];
  Assignments sorted;
  sorted.token.resize(a.T * a.K);
  sorted.weight.resize(a.T * a.K);
  std::vector<size_t> next(start.begin(), start.end() - 1);
  for (size_t i = 0; i < a.T * a.K; ++i) {
    const size_t at = next[a.expert_ids[i]]++;
    sorted.token[at] = i / a.K;
    sorted.weight[at] = a.expert_weights[i];
  }
  for (size_t e = 0; e < a.E; ++e) {
    for (size_t at = start[e]; at < start[e + 1]; at += kRowBlock) {
      sorted.runs.push_back({e, at, std::min(at + kRowBlock, start[e + 1])});
    }
  }
  return sorted;
}

}  // namespace

void experts(const ExpertsArguments& a, const Gemm& g, const Parallel& parallel) {
  const Form form = form_of(a.weight_type, a.x_type);
  const size_t weight_bytes = size_of(a.weight_type);
  const Assignments sorted = sort_by_expert(a);
  const size_t count = a.T * a.K;
  const PackedRows x(g, form, a.x_type, a.hidden, a.T, a.D, parallel);
  std::vector<const void*> x_of(count);  // the packed row of each assignment's token
  for (size_t i = 0; i < count; ++i) x_of[i] = x.pointers()[sorted.token[i]];

  // h = silu(gate x) * (up x), rounded to the activations' dtype.
  std::vector<float> h(count * a.F);
  const size_t blocks = tasks_for(a.F * a.D * weight_bytes * 2, kTaskBytes, a.F);
  const size_t block = (a.F + blocks - 1) / blocks;
  parallel(sorted.runs.size() * blocks, [&](size_t task) {
    const Run& run = sorted.runs[task / blocks];
    const size_t first = task % blocks * block;
    if (first >= a.F) return;
    const size_t n = std::min(block, a.F - first);
    const size_t tokens = run.end - run.begin;
    thread_local std::vector<float> sums;
    if (sums.size() < 2 * tokens * n) sums.resize(2 * tokens * n);
    float* halves[2] = {sums.data(), sums.data() + tokens * n};  // gate, up: [tokens, n]
    for (size_t half = 0; half < 2; ++half) {
      const size_t row = run.expert * 2 * a.F + half * a.F + first;
      const auto* w = static_cast<const uint8_t*>(a.gate_up) + row * a.D * weight_bytes;
      g.multiply(form, w, n, x_of.data() + run.begin, tokens, a.D, halves[half], n);
      if (!a.gate_up_scale) continue;
      for (size_t t = 0; t < tokens; ++t) {
        const float scale = x.scale(sorted.token[run.begin + t]);
        for (size_t i = 0; i < n; ++i) halves[half][t * n + i] *= scale * a.gate_up_scale[row + i];
      }
    }
    for (size_t t = 0; t < tokens; ++t) {
      float* out = h.data() + (run.begin + t) * a.F + first;
      g.silu_mul(halves[0] + t * n, halves[1] + t * n, n, out);
    }
  });

  PackedRows packed_h(g, form, count, a.F);
  split(parallel, count, a.F, [&](size_t begin, size_t end) {
    thread_local std::vector<uint16_t> rounded;
    for (size_t i = begin; i < end; ++i) {
      float* row = h.data() + i * a.F;
      if (a.x_type != Type::f32) {
        if (rounded.size() < a.F) rounded.resize(a.F);
        store_f32(a.x_type, row, 0, a.F, rounded.data());
        load_f32(a.x_type, rounded.data(), 0, a.F, row);
      }
      packed_h.set(g, i, row);
    }
  });

  const size_t weights_per_column = std::max<size_t>(1, sorted.runs.size()) * a.F * weight_bytes;
  const size_t column_tasks = tasks_for(a.D * weights_per_column, kTaskBytes, std::min(a.D, kMostTasks));
  const size_t columns = (a.D + column_tasks - 1) / column_tasks;
  parallel(column_tasks, [&](size_t task) {
    const size_t first = task * columns;
    if (first >= a.D) return;
    const size_t n = std::min(columns, a.D - first);
    thread_local std::vector<float> total, sums;
    total.assign(a.T * n, 0.0f);
    if (sums.size() < kRowBlock * n) sums.resize(kRowBlock * n);
    for (const Run& run : sorted.runs) {
      const size_t row = run.expert * a.D + first;
      const auto* w = static_cast<const uint8_t*>(a.down) + row * a.F * weight_bytes;
      g.multiply(form, w, n, packed_h.pointers() + run.begin, run.end - run.begin, a.F, sums.data(), n);
      for (size_t at = run.begin; at < run.end; ++at) {
        const float* y = sums.data() + (at - run.begin) * n;
        float* sum = total.data() + sorted.token[at] * n;
        const float weight = sorted.weight[at];
        if (a.down_scale) {
          const float scale = packed_h.scale(at);
          for (size_t i = 0; i < n; ++i) sum[i] += weight * (y[i] * (scale * a.down_scale[row + i]));
        } else {
          for (size_t i = 0; i < n; ++i) sum[i] += weight * y[i];
        }
      }
    }
    for (size_t t = 0; t < a.T; ++t) {
      store_f32(a.x_type, total.data() + t * n, t * a.D + first, n, a.out);
    }
  });
}

}  // namespace glm
