// Tokens are sorted by expert. Stage one: a task computes a block of silu(gate) * up columns for one expert's tokens.
// Stage two: a task computes a block of output columns, going over all chosen experts in ascending order, so that a
// token's sum has one order whatever the number of threads. Each chosen expert's weights are read once per stage and
// run of tokens. A shared expert is one more, with all tokens.
#include "plugins/moe_experts/experts.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "plugins/cpu/packed_rows.h"

namespace glm {
namespace {

// So many tokens at a time, which bounds the memory for intermediate results; each expert still has enough of them that
// its weights, read once more, cost little.
constexpr size_t kTokensAtATime = 1024;

// The weights of one expert.
struct Mlp {
  size_t F;
  const uint8_t *gate, *up, *down;
  const float *gate_scale, *up_scale, *down_scale;
};

// Assignments (token, slot) of one expert, at most kRowsPerTask.
struct TokenRun {
  Mlp mlp;
  size_t begin, end;
};

struct Assignments {
  std::vector<size_t> token;  // by position: routed ones sorted by expert, then those of the shared expert
  std::vector<float> weight;
  std::vector<TokenRun> routed, shared;
  size_t experts = 0;  // that any token chose
};

void cut(const Mlp& mlp, size_t begin, size_t end, std::vector<TokenRun>& runs) {
  for (size_t at = begin; at < end; at += kRowsPerTask) runs.push_back({mlp, at, std::min(at + kRowsPerTask, end)});
}

Mlp routed_mlp(const ExpertsArguments& a, size_t e) {
  const size_t bytes = size_of(a.weight_type);
  const uint8_t* gate = static_cast<const uint8_t*>(a.gate_up) + e * 2 * a.F * a.D * bytes;
  const float* gate_scale = a.gate_up_scale ? a.gate_up_scale + e * 2 * a.F : nullptr;
  return {a.F,
          gate,
          gate + a.F * a.D * bytes,
          static_cast<const uint8_t*>(a.down) + e * a.D * a.F * bytes,
          gate_scale,
          gate_scale ? gate_scale + a.F : nullptr,
          a.down_scale ? a.down_scale + e * a.D : nullptr};
}

Mlp shared_mlp(const SharedExpert& s) {
  const auto bytes = [](const void* p) { return static_cast<const uint8_t*>(p); };
  return {s.F, bytes(s.gate), bytes(s.up), bytes(s.down), s.gate_scale, s.up_scale, s.down_scale};
}

Assignments sort_by_expert(const ExpertsArguments& a) {
  const size_t count = a.T * a.K;
  std::vector<size_t> start(a.E + 1, 0);
  for (size_t i = 0; i < count; ++i) {
    const int32_t e = a.expert_ids[i];
    if (e < 0 || static_cast<size_t>(e) >= a.E) {
      throw std::invalid_argument("expert id " + std::to_string(e) + " is out of range: there are " +
                                  std::to_string(a.E) + " experts.");
    }
    ++start[static_cast<size_t>(e) + 1];
  }
  for (size_t e = 0; e < a.E; ++e) start[e + 1] += start[e];
  Assignments sorted;
  sorted.token.resize(count + (a.shared ? a.T : 0));
  sorted.weight.resize(count);
  std::vector<size_t> next(start.begin(), start.end() - 1);
  for (size_t i = 0; i < count; ++i) {
    const size_t at = next[static_cast<size_t>(a.expert_ids[i])]++;
    sorted.token[at] = i / a.K;
    sorted.weight[at] = a.expert_weights[i];
  }
  for (size_t e = 0; e < a.E; ++e) {
    cut(routed_mlp(a, e), start[e], start[e + 1], sorted.routed);
    if (start[e] < start[e + 1]) ++sorted.experts;
  }
  if (a.shared) {
    for (size_t t = 0; t < a.T; ++t) sorted.token[count + t] = t;
    cut(shared_mlp(*a.shared), count, count + a.T, sorted.shared);
  }
  return sorted;
}

// Intermediate results. They stay with the thread that calls, so that a step touches no fresh pages.
struct Intermediate {
  PackedRows x, routed, shared;
  std::vector<float> hidden;  // [T * K, F], then [T, F of the shared expert]
};

// The experts of some tokens, one stage after the other.
class Stages {
 public:
  Stages(const ExpertsArguments& a, const Gemm& g, const Parallel& parallel, Intermediate& memory)
      : a_(a),
        m_(memory),
        g_(g),
        parallel_(parallel),
        form_(form_of(a.weight_type, a.x_type)),
        weight_bytes_(size_of(a.weight_type)),
        sorted_(sort_by_expert(a)),
        routed_count_(a.T * a.K),
        few_(routed_count_ <= kFewRows * sorted_.routed.size()) {}

  // Returns the number of experts that any token chose.
  size_t run() {
    activate();
    pack();
    combine();
    return sorted_.experts;
  }

 private:
  float* hidden_row(size_t position) {
    if (position < routed_count_) return m_.hidden.data() + position * a_.F;
    return m_.hidden.data() + routed_count_ * a_.F + (position - routed_count_) * a_.shared->F;
  }

  // Stage one: silu(gate x) * (up x) of every assignment.
  void activate() {
    const PackedRows& x = m_.x;
    m_.x.pack(g_, form_, a_.x_type, a_.hidden, a_.T, a_.D, parallel_);
    const size_t count = sorted_.token.size();
    std::vector<const void*> x_of(count);
    std::vector<float> scale_of(count);
    for (size_t i = 0; i < count; ++i) {
      x_of[i] = x.pointers()[sorted_.token[i]];
      scale_of[i] = x.scale(sorted_.token[i]);
    }
    const size_t elements = routed_count_ * a_.F + (a_.shared ? a_.T * a_.shared->F : 0);
    if (m_.hidden.size() < elements) m_.hidden.resize(elements);

    struct Block {
      const TokenRun* run;
      size_t first, columns;
    };
    std::vector<Block> blocks;
    for (const auto* runs : {&sorted_.shared, &sorted_.routed}) {
      for (const TokenRun& run : *runs) {
        const size_t F = run.mlp.F, most = few_ ? std::max(kStreamBytes / (a_.D * weight_bytes_), F / 8) : 512;
        const size_t columns = std::min(F, std::max<size_t>(most, 8));
        for (size_t first = 0; first < F; first += columns) {
          blocks.push_back({&run, first, std::min(columns, F - first)});
        }
      }
    }
    parallel_(blocks.size(), [&](size_t task) {
      const auto [run, first, n] = blocks[task];
      const Mlp& mlp = run->mlp;
      const size_t tokens = run->end - run->begin, offset = first * a_.D * weight_bytes_;
      const void* const* rows = x_of.data() + run->begin;
      const float* scales = scale_of.data() + run->begin;
      thread_local std::vector<float> sums;
      if (sums.size() < 2 * tokens * n) sums.resize(2 * tokens * n);
      float *gate = sums.data(), *up = gate + tokens * n;  // [tokens, n]
      const float* gate_scale = mlp.gate_scale ? mlp.gate_scale + first : nullptr;
      const float* up_scale = mlp.up_scale ? mlp.up_scale + first : nullptr;
      scaled_product(g_, form_, mlp.gate + offset, gate_scale, n, rows, scales, tokens, a_.D, gate);
      scaled_product(g_, form_, mlp.up + offset, up_scale, n, rows, scales, tokens, a_.D, up);
      // A shared expert's gate and up are results of Linear, which routed ones have no need to be.
      if (run->begin >= routed_count_) round_f32(a_.x_type, gate, 2 * tokens * n);
      for (size_t t = 0; t < tokens; ++t) {
        g_.silu_mul(gate + t * n, up + t * n, n, hidden_row(run->begin + t) + first);
      }
    });
  }

  // Its results, rounded to the activations' dtype, as the rows of the next product.
  void pack() {
    const auto prepare = [&](PackedRows& rows, size_t start, size_t count, size_t width) {
      rows.resize(g_, form_, count, width);
      split(parallel_, count, width, [&](size_t begin, size_t end) {
        for (size_t i = begin; i < end; ++i) {
          float* row = hidden_row(start + i);
          round_f32(a_.x_type, row, width);
          rows.set(g_, i, row);
        }
      });
    };
    prepare(m_.routed, 0, routed_count_, a_.F);
    if (a_.shared) prepare(m_.shared, routed_count_, a_.T, a_.shared->F);
  }

  // Stage two: out = the sum of what the experts give, by their weights.
  void combine() {
    const size_t most = few_ ? std::max<size_t>(a_.D / 32, 16) : std::max<size_t>(a_.D / 8, 128);
    const size_t columns = std::min(a_.D, ceil_div(most, 8) * 8);
    parallel_(ceil_div(a_.D, columns), [&](size_t task) {
      const size_t first = task * columns, n = std::min(columns, a_.D - first);
      thread_local std::vector<float> total, sums;
      total.assign(a_.T * n, 0.0f);
      if (sums.size() < kRowsPerTask * n) sums.resize(kRowsPerTask * n);
      for (const TokenRun& run : sorted_.routed) {
        down(run, m_.routed, run.begin, first, n, sums.data());
        for (size_t at = run.begin; at < run.end; ++at) {
          const float* y = sums.data() + (at - run.begin) * n;
          float* sum = total.data() + sorted_.token[at] * n;
          for (size_t i = 0; i < n; ++i) sum[i] += sorted_.weight[at] * y[i];
        }
      }
      for (const TokenRun& run : sorted_.shared) {
        down(run, m_.shared, run.begin - routed_count_, first, n, sums.data());
        for (size_t at = run.begin; at < run.end; ++at) {
          float* y = sums.data() + (at - run.begin) * n;
          float* sum = total.data() + sorted_.token[at] * n;
          round_f32(a_.x_type, y, n);
          round_f32(a_.x_type, sum, n);
          for (size_t i = 0; i < n; ++i) sum[i] += y[i];
        }
      }
      for (size_t t = 0; t < a_.T; ++t) store_f32(a_.x_type, total.data() + t * n, t * a_.D + first, n, a_.out);
    });
  }

  // Columns first .. first + n of down's product with a run's rows, which start at `row`.
  void down(const TokenRun& run, const PackedRows& rows, size_t row, size_t first, size_t n, float* y) const {
    const Mlp& mlp = run.mlp;
    scaled_product(g_, form_, mlp.down + first * mlp.F * weight_bytes_,
                   mlp.down_scale ? mlp.down_scale + first : nullptr, n, rows.pointers() + row, rows.scales() + row,
                   run.end - run.begin, mlp.F, y);
  }

  const ExpertsArguments& a_;
  Intermediate& m_;
  const Gemm& g_;
  const Parallel& parallel_;
  const Form form_;
  const size_t weight_bytes_;
  const Assignments sorted_;
  const size_t routed_count_;
  const bool few_;  // a product is bound by reading its weights
};

}  // namespace

size_t experts(const ExpertsArguments& a, const Gemm& g, const Parallel& parallel) {
  thread_local Intermediate memory;
  size_t needed = 0;
  for (size_t start = 0; start < a.T; start += kTokensAtATime) {
    ExpertsArguments part = a;
    part.T = std::min(kTokensAtATime, a.T - start);
    part.hidden = static_cast<const uint8_t*>(a.hidden) + start * a.D * size_of(a.x_type);
    part.out = static_cast<uint8_t*>(a.out) + start * a.D * size_of(a.x_type);
    part.expert_ids += start * a.K;
    part.expert_weights += start * a.K;
    needed += Stages(part, g, parallel, memory).run();
  }
  return needed;
}

}  // namespace glm
