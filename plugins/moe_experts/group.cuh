// Assignments sorted by expert (stable), and the runs that the products' kernels go through.
//
// Grid: block 0 groups; the others quantize four rows of hidden each where the weights are E4M3. In block 0 a warp owns
// a sixteenth of the assignments: it counts them by expert, learns from the others' counts where its own ones go, and
// puts them there. 65536 assignments are 128 steps of a warp, so that one block is enough.
#pragma once

#include "plugins/moe_experts/plan.h"
#include "plugins/moe_experts/quantize.cuh"

namespace glm {

constexpr int kGroupWarps = kQuantizeThreads / 32;

struct GroupArguments {
  const int32_t* expert_ids;  // [A]
  int32_t* order;             // [A]: the assignment at a position
  Run* runs;
  int32_t* run_count;
  int assignments, experts, run_tokens;
};

inline int64_t group_shared_bytes(int64_t experts) {
  return (kGroupWarps * experts + 3 * experts) * static_cast<int64_t>(sizeof(int32_t));
}

// Calls visit(assignment, expert, lanes with the same expert) for a warp's assignments, 32 by 32; experts that do not
// exist are -1.
template <class Visit>
__device__ __forceinline__ void visit_assignments(const GroupArguments& a, int warp, int lane, Visit visit) {
  const int share = (a.assignments + kGroupWarps * 32 - 1) / (kGroupWarps * 32) * 32;
  const int begin = warp * share, end = min(a.assignments, begin + share);
  for (int i = begin; i < end; i += 32) {
    const int mine = i + lane;
    int expert = mine < end ? a.expert_ids[mine] : -1;
    if (expert < 0 || expert >= a.experts) expert = -1;
    visit(mine, expert, match_any(static_cast<unsigned>(expert)));
    warp_sync();
  }
}

__device__ __forceinline__ int sum_below(int value, int lane) {
  int sum = value;
  for (int lanes = 1; lanes < 32; lanes *= 2) {
    const int other = shuffle_up(sum, lanes);
    if (lane >= lanes) sum += other;
  }
  return sum - value;
}

__device__ __forceinline__ void group(const GroupArguments& a) {
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32, E = a.experts;
  int* counts = reinterpret_cast<int*>(shared_memory());  // [warps, E], then what stands before the warp's own
  int* total = counts + kGroupWarps * E;                  // [E]
  int* first = total + E;                                 // [E]: position of an expert's first assignment
  int* first_run = first + E;                             // [E]
  int* mine = counts + warp * E;

  for (int i = thread; i < kGroupWarps * E; i += kQuantizeThreads) counts[i] = 0;
  block_sync();
  const unsigned below = (1u << lane) - 1;
  visit_assignments(a, warp, lane, [&](int, int expert, unsigned same) {
    if (expert >= 0 && (same & below) == 0) mine[expert] += popcount(same);
  });
  block_sync();
  for (int e = thread; e < E; e += kQuantizeThreads) {
    int sum = 0;
    for (int w = 0; w < kGroupWarps; ++w) {
      const int count = counts[w * E + e];
      counts[w * E + e] = sum;
      sum += count;
    }
    total[e] = sum;
  }
  block_sync();
  if (warp == 0) {
    int position = 0, runs = 0;
    for (int begin = 0; begin < E; begin += 32) {
      const int e = begin + lane, count = e < E ? total[e] : 0, own_runs = (count + a.run_tokens - 1) / a.run_tokens;
      const int before = sum_below(count, lane), runs_before = sum_below(own_runs, lane);
      if (e < E) {
        first[e] = position + before;
        first_run[e] = runs + runs_before;
      }
      position += shuffle(before + count, 31);
      runs += shuffle(runs_before + own_runs, 31);
    }
    if (lane == 0) *a.run_count = runs;
  }
  block_sync();
  for (int e = thread; e < E; e += kQuantizeThreads) {
    for (int done = 0, run = first_run[e]; done < total[e]; done += a.run_tokens, ++run) {
      a.runs[run] = {e, first[e] + done, min(a.run_tokens, total[e] - done), 0};
    }
  }
  visit_assignments(a, warp, lane, [&](int assignment, int expert, unsigned same) {
    int position = 0;
    if (expert >= 0) {
      position = first[expert] + mine[expert] + popcount(same & below);
      a.order[position] = assignment;
    }
    warp_sync();
    if (expert >= 0 && (same & below) == 0) mine[expert] += popcount(same);
  });
}

template <class X>
__global__ void __launch_bounds__(kQuantizeThreads) group_kernel(const GroupArguments a, const QuantizeArguments x) {
  wait_for_previous_kernel();
  start_next_kernel();
  if (blockIdx.x == 0) {
    group(a);
  } else {
    quantize_four_rows(static_cast<const X*>(x.x), x.values, x.scales, x.rows, x.width,
                       static_cast<int>(blockIdx.x) - 1);
  }
}

}  // namespace glm
