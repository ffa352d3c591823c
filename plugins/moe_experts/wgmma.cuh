// Tiles multiplied by warpgroups, on SM90.
//
// Grid: at most one block per SM, of three warpgroups. The first one copies: it goes through all stages of the block's
// tiles as fast as stages become free. The others multiply 64 tokens with 128 pairs each, first rows and second rows of
// the pairs as two products of 64 x 128. Nobody waits for all others: two barriers per stage tell that it is full, and
// that it is free; so one warpgroup may store its tile while another one multiplies.
#pragma once

#include "plugins/moe_experts/tiles.cuh"

namespace glm {

constexpr int kWarpgroup = 128, kMultiplyingWarps = 8;

// By warps: all lanes of a warp have done their part before one of them tells.
__device__ __forceinline__ void warp_arrive(Barrier* barrier, int lane) {
  warp_sync();
  if (lane == 0) barrier_arrive(barrier);
}

template <bool gate_up>
__device__ __forceinline__ void copy_stages(const Product& p, unsigned char* stages, Barrier* full, Barrier* free,
                                            int thread) {
  constexpr int kStages = WgmmaShape::kStages, kPending = 2;
  TileStream<WgmmaShape, gate_up, kWarpgroup> stream(p, thread);
  const auto tell = [&](int number) {
    fence_for_products();
    warp_arrive(full + number % kStages, thread % 32);
  };
  int number = 0;
  for (; stream.has_more(); ++number) {
    const int stage = number % kStages;
    barrier_wait(free + stage, (number / kStages + 1) % 2);
    stream.copy_next(stages + stage * kStageBytes<WgmmaShape>);
    copy_async_commit();
    copy_async_wait<kPending>();
    if (number >= kPending) tell(number - kPending);
  }
  copy_async_wait<0>();
  for (int late = max(0, number - kPending); late < number; ++late) tell(late);
}

// sum[half] += a stage's 128 bytes.
template <class T>
__device__ __forceinline__ void multiply_stage(const unsigned char* tokens, const unsigned char* weights,
                                               float (&sum)[2][64]) {
  constexpr int kHalfBytes = WgmmaShape::kPairs * kStageWidth;
  if constexpr (sizeof(T) == 1) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float part[64];
      product_begin();
#pragma unroll
      for (int at = 0; at < kStageWidth; at += 32) {
        product_64x128(T{}, part, product_operand(tokens + at), product_operand(weights + half * kHalfBytes + at),
                       at > 0);
      }
      product_wait(part);
#pragma unroll
      for (int i = 0; i < 64; ++i) sum[half][i] += part[i];
    }
  } else {
    product_begin();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int at = 0; at < kStageWidth; at += 32) {
        product_64x128(T{}, sum[half], product_operand(tokens + at), product_operand(weights + half * kHalfBytes + at),
                       true);
      }
    }
    product_wait(sum[0]);
    product_wait(sum[1]);
  }
}

template <class T, bool gate_up>
__device__ __forceinline__ void multiply_tiles(const Product& p, const unsigned char* stages, Barrier* full,
                                               Barrier* free, int thread) {
  const int lane = thread % 32, first_row = thread / kWarpgroup * 64;
  int number = 0;  // of the stage
  const int end = *p.run_count * p.tiles;
  for (int at = static_cast<int>(blockIdx.x); at < end; at += static_cast<int>(gridDim.x)) {
    const Tile tile = tile_at<WgmmaShape>(p, at);
    const bool has_tokens = first_row < tile.run.count;
    float sum[2][64] = {};
    for (int i = 0; i < stages_of_row(p); ++i, ++number) {
      const int stage = number % WgmmaShape::kStages;
      barrier_wait(full + stage, number / WgmmaShape::kStages % 2);
      const unsigned char* tokens = stages + stage * kStageBytes<WgmmaShape>;
      if (has_tokens) {
        multiply_stage<T>(tokens + first_row * kStageWidth, tokens + WgmmaShape::kRows * kStageWidth, sum);
      }
      warp_arrive(free + stage, lane);
    }
    if (!has_tokens) continue;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = first_row + thread % kWarpgroup / 32 * 16 + r * 8 + lane / 4;
      if (row >= tile.run.count) continue;
      const TokenOfTile token = token_of_tile<gate_up>(p, tile.run.first + row);
#pragma unroll
      for (int j = 0; j < 16; ++j) {
        const int pair = j * 8 + lane % 4 * 2, k = j * 4 + r * 2;
        float scales[2][2];
        pair_scales<gate_up>(p, tile.run.expert, tile.first_pair, WgmmaShape::kPairs, pair, scales);
        finish_pairs<gate_up>(p, token, tile.first_pair, WgmmaShape::kPairs, pair, scales,
                              {{sum[0][k], sum[0][k + 1]}, {sum[1][k], sum[1][k + 1]}});
      }
    }
  }
}

template <class T, bool gate_up>
__global__ void __launch_bounds__(WgmmaShape::kThreads, 1) wgmma_kernel(const Product p) {
  wait_for_previous_kernel();
  start_next_kernel();
  if constexpr (kHasWarpgroups) {
    unsigned char* stages = shared_memory();
    auto* full = reinterpret_cast<Barrier*>(stages + WgmmaShape::kStages * kStageBytes<WgmmaShape>);
    Barrier* free = full + WgmmaShape::kStages;
    const int thread = static_cast<int>(threadIdx.x);
    if (thread < WgmmaShape::kStages) {
      barrier_init(full + thread, kWarpgroup / 32);
      barrier_init(free + thread, kMultiplyingWarps);
    }
    block_sync();
    // 56 and 224 registers: what three warpgroups of 168 have, shared out by need.
    if (thread < kWarpgroup) {
      fewer_registers<56>();
      copy_stages<gate_up>(p, stages, full, free, thread);
    } else {
      more_registers<224>();
      multiply_tiles<T, gate_up>(p, stages, full, free, thread - kWarpgroup);
    }
  }
}

}  // namespace glm
