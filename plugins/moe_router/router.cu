// MoERouter: a warp routes a token, all in registers and in one launch. Lane l holds experts l, l + 32, l + 64, ...
//
// A choice is compared as an integer of the same order ("key"), so that the best of a warp is one instruction, and the
// lowest expert that has it is a second one: ties go to the lowest id. K such rounds take the experts one by one. Few
// tokens get a block each, so that every token has a multiprocessor to itself.
#include "plugins/cuda/check.h"
#include "plugins/cuda/device.cuh"

namespace glm {
namespace {

constexpr int kLanes = 32;
constexpr int kMostExperts = 512, kMostChosen = kLanes, kMostGroups = kLanes;
constexpr int kFewTokens = 256;  // above: several warps per block, since blocks cost more to start than warps

constexpr unsigned kTaken = 0;                  // below every key
constexpr unsigned kMinusInfinity = 0x7fffffu;  // key_of(-infinity)
constexpr unsigned kNan = 0xffffffffu;          // above every number, as torch.sort has it

struct Router {
  const float* logits_TE;
  const float* bias_E;
  int32_t* ids_TK;
  float* weights_TK;
  int T, E, K, G, kept_groups, normalize;
  float scaling;
};

__device__ __forceinline__ unsigned key_of(float x) {
  const unsigned bits = bits_of(x);
  return x != x ? kNan : bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float value_of(unsigned key) {
  return float_of(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

// expf is correct to 2 units in the last place; __expf would not be.
__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// The lowest id among the lanes' candidates with the greatest key.
__device__ __forceinline__ unsigned best_id(unsigned key, unsigned id) {
  return warp_min(key == warp_max(key) ? id : ~0u);
}

// Sets the keys of experts outside the best groups to that of minus infinity. A group's score is the sum of its two
// best; lane g keeps that of group g.
template <int N>
__device__ __forceinline__ void mask_groups(unsigned (&key)[N], int lane, const Router& r) {
  const int size = r.E / r.G;
  unsigned group_key = kTaken;
  for (int g = 0; g < r.G; ++g) {
    unsigned best = kTaken, second = kTaken;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const int e = i * kLanes + lane;
      const unsigned k = e >= g * size && e < (g + 1) * size ? key[i] : kTaken;
      second = max(second, min(best, k));
      best = max(best, k);
    }
    const unsigned first = warp_max(best);
    const int owner = static_cast<int>(warp_min(best == first ? static_cast<unsigned>(lane) : ~0u));
    second = warp_max(lane == owner ? second : best);
    const float score = size > 1 ? value_of(first) + value_of(second) : value_of(first);
    if (lane == g) group_key = key_of(score);
  }
  unsigned kept = 0;
  for (int i = 0; i < r.kept_groups; ++i) {
    const unsigned g = best_id(group_key, static_cast<unsigned>(lane));
    kept |= 1u << g;
    if (lane == static_cast<int>(g)) group_key = kTaken;
  }
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const int e = i * kLanes + lane;
    if (e < r.E && (kept >> (e / size) & 1u) == 0) key[i] = kMinusInfinity;
  }
}

// grid.x * (blockDim.x / 32) warps, one per token; N * 32 >= E.
template <int N>
__global__ void __launch_bounds__(4 * kLanes) route_kernel(Router r) {
  wait_for_previous_kernel();
  start_next_kernel();
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  const int t = static_cast<int>((blockIdx.x * blockDim.x + threadIdx.x) / kLanes);
  if (t >= r.T) return;

  float score[N];
  unsigned key[N];
  const float* logits_E = r.logits_TE + static_cast<int64_t>(t) * r.E;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const int e = i * kLanes + lane;
    score[i] = e < r.E ? sigmoid(logits_E[e]) : 0.0f;
    key[i] = e < r.E ? key_of(score[i] + r.bias_E[e]) : kTaken;
  }
  if (r.kept_groups < r.G) mask_groups(key, lane, r);

  unsigned my_id = 0;  // lane k keeps the k-th expert and its score
  float my_score = 0;
  for (int k = 0; k < r.K; ++k) {
    unsigned best = kTaken;
    float best_score = 0;
    int where = 0;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (key[i] > best) {
        best = key[i];
        best_score = score[i];
        where = i * kLanes + lane;
      }
    }
    const unsigned id = best_id(best, static_cast<unsigned>(where));
    const float chosen = shuffle(best_score, static_cast<int>(id) % kLanes);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (i * kLanes + lane == static_cast<int>(id)) key[i] = kTaken;
    }
    if (lane == k) {
      my_id = id;
      my_score = chosen;
    }
  }

  float denominator = 1.0f;
  if (r.normalize) {
    float sum = my_score;
#pragma unroll
    for (int mask = kLanes / 2; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
    denominator = sum + 1e-20f;
  }
  if (lane < r.K) {
    const int64_t at = static_cast<int64_t>(t) * r.K + lane;
    r.ids_TK[at] = static_cast<int32_t>(my_id);
    r.weights_TK[at] = my_score / denominator * r.scaling;
  }
}

template <int N>
int start(const Router& r, void* stream) {
  const unsigned warps = r.T <= kFewTokens ? 1 : 4;
  const unsigned blocks = (static_cast<unsigned>(r.T) + warps - 1) / warps;
  return launch(route_kernel<N>, {dim3(blocks), warps * kLanes, 0, stream}, r);
}

}  // namespace
}  // namespace glm

extern "C" int32_t glm_cuda_moe_router(const float* logits, const float* correction_bias, int32_t* expert_ids,
                                       float* expert_weights, int32_t T, int32_t E, int32_t top_k, int32_t n_group,
                                       int32_t topk_group, int32_t norm_topk_prob, float routed_scaling_factor,
                                       void* stream) {
  using glm::Argument;
  using glm::Fault;
  glm::Check check;
  check.range(Argument::T, T, 0, INT32_MAX / 4);
  check.range(Argument::E, E, 1, glm::kMostExperts);
  check.range(Argument::top_k, top_k, 1, E < glm::kMostChosen ? E : glm::kMostChosen);
  check.range(Argument::n_group, n_group, 1, glm::kMostGroups);
  check.that(n_group >= 1 && E % n_group == 0, Argument::n_group, Fault::unsupported);
  check.range(Argument::topk_group, topk_group, 1, n_group);
  check.range(Argument::norm_topk_prob, norm_topk_prob, 0, 1);
  if (check.code() == 0 && T == 0) return 0;
  check.pointer(Argument::logits, logits, 4);
  check.pointer(Argument::correction_bias, correction_bias, 4);
  check.pointer(Argument::expert_ids, expert_ids, 4);
  check.pointer(Argument::expert_weights, expert_weights, 4);
  if (check.code() != 0) return check.code();
  const glm::Router router{logits,  correction_bias, expert_ids,     expert_weights,       T, E, top_k,
                           n_group, topk_group,      norm_topk_prob, routed_scaling_factor};
  // Registers for 32 N experts; the widths are those of the GLM models (128, 160) and round numbers.
  if (E <= 64) return glm::start<2>(router, stream);
  if (E <= 128) return glm::start<4>(router, stream);
  if (E <= 160) return glm::start<5>(router, stream);
  if (E <= 256) return glm::start<8>(router, stream);
  return glm::start<16>(router, stream);
}
