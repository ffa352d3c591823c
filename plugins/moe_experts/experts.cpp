// Tokens are sorted by expert. First, a task computes a block of silu(gate) * up columns for one expert's tokens, and
// who computes the last one packs them for what follows. Then a task computes a block of output columns, going over all
// chosen experts in ascending order, so that a token's sum has one order whatever the number of threads. Each chosen
// expert's weights are read once per stage and run of tokens. A shared expert is one more, with all tokens; it needs no
// router, and its first stage goes on while that is at work.
#include "plugins/moe_experts/experts.h"

#include <algorithm>
#include <atomic>
#include <memory>
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

// Those of routed experts.
struct Assignments {
  std::vector<size_t> token;  // by position, sorted by expert
  std::vector<float> weight;
  std::vector<TokenRun> runs;
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
  sorted.token.resize(count);
  sorted.weight.resize(count);
  std::vector<size_t> next(start.begin(), start.end() - 1);
  for (size_t i = 0; i < count; ++i) {
    const size_t at = next[static_cast<size_t>(a.expert_ids[i])]++;
    sorted.token[at] = i / a.K;
    sorted.weight[at] = a.expert_weights[i];
  }
  for (size_t e = 0; e < a.E; ++e) {
    cut(routed_mlp(a, e), start[e], start[e + 1], sorted.runs);
    if (start[e] < start[e + 1]) ++sorted.experts;
  }
  return sorted;
}

// Intermediate results. They stay with the thread that calls, so that a step touches no fresh pages.
struct Intermediate {
  PackedRows x, routed, shared;
  std::vector<float> routed_hidden, shared_hidden;
};

// One kind of experts, routed or shared: the runs of tokens, and what is in between.
struct Group {
  const std::vector<TokenRun>* runs;
  size_t F, blocks, columns;                    // blocks per run, columns per block
  float* hidden;                                // [positions, F], silu(gate) * up
  PackedRows* packed;                           // the same, as it is multiplied
  std::unique_ptr<std::atomic<size_t>[]> left;  // blocks of each run
};

// The experts of some tokens.
class Stages {
 public:
  Stages(const ExpertsArguments& a, const Gemm& g, Intermediate& memory)
      : a_(a),
        m_(memory),
        g_(g),
        form_(form_of(a.weight_type, a.x_type)),
        weight_bytes_(size_of(a.weight_type)),
        few_(a.T * a.K <= kFewRows * a.E) {}

  // Adds the stages to a flow, which is to run before this ends; returns the last one. Ids and weights are there when
  // `chosen` is done.
  Flow::Done add(Flow& flow, Flow::Done chosen) {
    const Flow::Done packed = m_.x.pack(flow, g_, form_, a_.x_type, a_.hidden, a_.T, a_.D, 0);
    const Flow::Done sorted = flow.stage({1, chosen | packed, [&](size_t) { sort(); }});
    Flow::Done active = 0;
    if (a_.shared) {
      cut(shared_mlp(*a_.shared), 0, a_.T, shared_runs_);
      shared_ = group(shared_runs_, shared_runs_.size(), a_.T, a_.shared->F, m_.shared, m_.shared_hidden);
      active |= activate(flow, shared_, shared_runs_.size(), packed);
    }
    // So many runs there may be: one for every expert that is chosen, and one more for every kRowsPerTask of its
    // tokens.
    const size_t runs = std::min(a_.T * a_.K, a_.E) + a_.T * a_.K / kRowsPerTask;
    routed_ = group(sorted_.runs, runs, a_.T * a_.K, a_.F, m_.routed, m_.routed_hidden);
    active |= activate(flow, routed_, runs, sorted);
    return combine(flow, active);
  }

  // The number of experts that any token chose, when the flow has run.
  size_t needed() const { return sorted_.experts; }

 private:
  void sort() {
    sorted_ = sort_by_expert(a_);
    x_of_.resize(sorted_.token.size());
    scale_of_.resize(sorted_.token.size());
    for (size_t i = 0; i < sorted_.token.size(); ++i) {
      x_of_[i] = m_.x.pointers()[sorted_.token[i]];
      scale_of_[i] = m_.x.scale(sorted_.token[i]);
    }
  }

  Group group(const std::vector<TokenRun>& runs, size_t most_runs, size_t positions, size_t F, PackedRows& packed,
              std::vector<float>& hidden) const {
    const size_t most = few_ ? std::max(kStreamBytes / (a_.D * weight_bytes_), F / 8) : 512;
    const size_t columns = std::min(F, std::max<size_t>(most, 8)), blocks = ceil_div(F, columns);
    if (hidden.size() < positions * F) hidden.resize(positions * F);
    packed.resize(g_, form_, positions, F);
    Group made{&runs, F, blocks, columns, hidden.data(), &packed, {}};
    made.left.reset(new std::atomic<size_t>[most_runs]);
    for (size_t i = 0; i < most_runs; ++i) made.left[i] = blocks;
    return made;
  }

  // Adds the stage of silu(gate x) * (up x) of every assignment of a group, in the form that the next product takes.
  Flow::Done activate(Flow& flow, Group& group, size_t most_runs, Flow::Done needs) {
    const auto multiply = [this, &group](size_t task) {
      const size_t i = task / group.blocks;
      if (i >= group.runs->size()) return;
      const TokenRun& run = (*group.runs)[i];
      block(group, run, task % group.blocks * group.columns);
      if (group.left[i].fetch_sub(1, std::memory_order_acq_rel) == 1) pack(group, run);
    };
    return flow.stage({most_runs * group.blocks, needs, multiply});
  }

  // silu(gate x) * (up x) of a run's tokens for a block of columns.
  void block(const Group& group, const TokenRun& run, size_t first) const {
    const Mlp& mlp = run.mlp;
    const size_t n = std::min(group.columns, group.F - first), offset = first * a_.D * weight_bytes_;
    const size_t tokens = run.end - run.begin;
    const bool shared = &group == &shared_;
    const void* const* rows = shared ? m_.x.pointers() + run.begin : x_of_.data() + run.begin;
    const float* scales = shared ? m_.x.scales() + run.begin : scale_of_.data() + run.begin;
    thread_local std::vector<float> sums;
    if (sums.size() < 2 * tokens * n) sums.resize(2 * tokens * n);
    float *gate = sums.data(), *up = gate + tokens * n;  // [tokens, n]
    const float* gate_scale = mlp.gate_scale ? mlp.gate_scale + first : nullptr;
    const float* up_scale = mlp.up_scale ? mlp.up_scale + first : nullptr;
    scaled_product(g_, form_, mlp.gate + offset, gate_scale, n, rows, scales, tokens, a_.D, gate);
    scaled_product(g_, form_, mlp.up + offset, up_scale, n, rows, scales, tokens, a_.D, up);
    // A shared expert's gate and up are results of Linear, which routed ones have no need to be.
    if (shared) round_f32(a_.x_type, gate, 2 * tokens * n);
    for (size_t t = 0; t < tokens; ++t) {
      g_.silu_mul(gate + t * n, up + t * n, n, group.hidden + (run.begin + t) * group.F + first);
    }
  }

  // A run's results, rounded to the activations' dtype, as rows of the next product.
  void pack(const Group& group, const TokenRun& run) const {
    for (size_t i = run.begin; i < run.end; ++i) {
      float* row = group.hidden + i * group.F;
      round_f32(a_.x_type, row, group.F);
      group.packed->set(g_, i, row);
    }
  }

  // Adds the stage of out = the sum of what the experts give, by their weights.
  Flow::Done combine(Flow& flow, Flow::Done needs) {
    const size_t most = few_ ? kStreamBytes / (a_.F * weight_bytes_) : std::max<size_t>(a_.D / 8, 128);
    const size_t columns = std::min(a_.D, round_up(std::max<size_t>(most, 1), 8));
    const auto multiply = [this, columns](size_t task) {
      const size_t first = task * columns;
      combine_block(first, std::min(columns, a_.D - first));
    };
    return flow.stage({ceil_div(a_.D, columns), needs, multiply});
  }

  void combine_block(size_t first, size_t n) const {
    thread_local std::vector<float> total, sums;
    total.assign(a_.T * n, 0.0f);
    if (sums.size() < kRowsPerTask * n) sums.resize(kRowsPerTask * n);
    const size_t routed = sorted_.runs.size(), count = routed + shared_runs_.size();
    for (size_t i = 0; i < count; ++i) {
      const TokenRun& mine = run(i);
      const bool shared = i >= routed;
      const PackedRows& rows = shared ? m_.shared : m_.routed;
      scaled_product(g_, form_, down_row(mine, first), mine.mlp.down_scale ? mine.mlp.down_scale + first : nullptr, n,
                     rows.pointers() + mine.begin, rows.scales() + mine.begin, mine.end - mine.begin, mine.mlp.F,
                     sums.data());
      for (size_t at = mine.begin; at < mine.end; ++at) {
        float* y = sums.data() + (at - mine.begin) * n;
        float* sum = total.data() + (shared ? at : sorted_.token[at]) * n;
        if (shared) {
          round_f32(a_.x_type, y, n);
          round_f32(a_.x_type, sum, n);
        }
        const float weight = shared ? 1.0f : sorted_.weight[at];
        for (size_t j = 0; j < n; ++j) sum[j] += weight * y[j];
      }
    }
    for (size_t t = 0; t < a_.T; ++t) store_f32(a_.x_type, total.data() + t * n, t * a_.D + first, n, a_.out);
  }

  // Runs of routed experts come first.
  const TokenRun& run(size_t i) const {
    const size_t routed = sorted_.runs.size();
    return i < routed ? sorted_.runs[i] : shared_runs_[i - routed];
  }

  const uint8_t* down_row(const TokenRun& run, size_t row) const {
    return run.mlp.down + row * run.mlp.F * weight_bytes_;
  }

  const ExpertsArguments& a_;
  Intermediate& m_;
  const Gemm& g_;
  const Form form_;
  const size_t weight_bytes_;
  const bool few_;  // a product is bound by reading its weights
  Assignments sorted_;
  std::vector<TokenRun> shared_runs_;
  std::vector<const void*> x_of_;  // by position
  std::vector<float> scale_of_;
  Group routed_, shared_;
};

}  // namespace

size_t experts(const ExpertsArguments& a, const Gemm& g, const Parallel& parallel, const Around& around) {
  thread_local Intermediate memory;
  size_t needed = 0;
  for (size_t start = 0; start < a.T; start += kTokensAtATime) {
    ExpertsArguments part = a;
    part.T = std::min(kTokensAtATime, a.T - start);
    part.hidden = static_cast<const uint8_t*>(a.hidden) + start * a.D * size_of(a.x_type);
    part.out = static_cast<uint8_t*>(a.out) + start * a.D * size_of(a.x_type);
    part.expert_ids += start * a.K;
    part.expert_weights += start * a.K;
    Flow flow;
    Stages stages(part, g, memory);
    const Flow::Done out = stages.add(flow, around.before ? around.before(flow, start, part.T) : 0);
    if (around.after) around.after(flow, start, part.T, out);
    flow.run(parallel);
    needed += stages.needed();
  }
  return needed;
}

}  // namespace glm
