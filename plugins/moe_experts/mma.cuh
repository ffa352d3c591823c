// Tiles multiplied by mma.sync, on every SM from 80 on.
//
// Grid: at most one block per SM. All 8 warps of a block copy and multiply; a barrier per stage. Warps stand 2 x 4:
// each has 64 tokens and 16 pairs, which is 4 x 4 products of 16 x 8.
#pragma once

#include "plugins/moe_experts/tiles.cuh"

namespace glm {

// sum[token tile][2 half + pair tile] += a stage's 128 bytes.
template <class T>
__device__ __forceinline__ void multiply_stage(const unsigned char* stage, int warp_row, int warp_column, int lane,
                                               float (&sum)[4][4][4]) {
  const unsigned char* weights = stage + MmaShape::kRows * kStageWidth;
  float part[4][4][4] = {};
#pragma unroll
  for (int vector = 0; vector < kStageWidth / 16; vector += 2) {
    unsigned b[4][2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      // Four matrices: the two pair tiles, of each the first and the second 16 bytes of the step.
      const int row = half * MmaShape::kPairs + warp_column * 16 + lane / 16 * 8 + lane % 8;
      unsigned matrix[4];
      load_matrix_x4(matrix, weights + swizzled(row, vector + lane / 8 % 2));
      for (int i = 0; i < 4; ++i) b[half * 2 + i / 2][i % 2] = matrix[i];
    }
#pragma unroll
    for (int tile = 0; tile < 4; ++tile) {
      // Rows 0-7 and 8-15 of the first 16 bytes, then of the second.
      unsigned a[4];
      load_matrix_x4(a, stage + swizzled(warp_row * 64 + tile * 16 + lane % 16, vector + lane / 16));
#pragma unroll
      for (int column = 0; column < 4; ++column) {
        if constexpr (Operand<T>::kShortSums) {
          mma_e4m3(part[tile][column], a, b[column]);
        } else {
          exact_mma(sum[tile][column], Exact<T>(a), b[column]);
        }
      }
    }
  }
  if constexpr (Operand<T>::kShortSums) {
#pragma unroll
    for (int i = 0; i < 64; ++i) sum[i / 16][i / 4 % 4][i % 4] += part[i / 16][i / 4 % 4][i % 4];
  }
}

template <class T, bool gate_up>
__global__ void __launch_bounds__(MmaShape::kThreads, 1) mma_kernel(const Product p) {
  wait_for_previous_kernel();
  start_next_kernel();
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  const int warp_row = thread / 128, warp_column = thread / 32 % 4;
  unsigned char* stages = shared_memory();
  TileStream<MmaShape, gate_up, MmaShape::kThreads> stream(p, thread);
  for (int i = 0; i < MmaShape::kStages - 1; ++i) {
    stream.copy_next(stages + i * kStageBytes<MmaShape>);
    copy_async_commit();
  }
  int stage = 0;
  const int end = *p.run_count * p.tiles;
  for (int number = static_cast<int>(blockIdx.x); number < end; number += static_cast<int>(gridDim.x)) {
    float sum[4][4][4] = {};
    for (int i = 0; i < stages_of_row(p); ++i) {
      copy_async_wait<MmaShape::kStages - 2>();
      block_sync();  // the stage is there, and everybody is done with the one before
      const int free_stage = stage == 0 ? MmaShape::kStages - 1 : stage - 1;
      stream.copy_next(stages + free_stage * kStageBytes<MmaShape>);
      copy_async_commit();
      multiply_stage<T>(stages + stage * kStageBytes<MmaShape>, warp_row, warp_column, lane, sum);
      stage = stage + 1 == MmaShape::kStages ? 0 : stage + 1;
    }

    const Tile tile = tile_at<MmaShape>(p, number);
    float scales[2][2][2];
    for (int j = 0; j < 2; ++j) {
      pair_scales<gate_up>(p, tile.run.expert, tile.first_pair, MmaShape::kPairs,
                           warp_column * 16 + j * 8 + lane % 4 * 2, scales[j]);
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int row = warp_row * 64 + i * 8 + lane / 4;
      if (row >= tile.run.count) continue;
      const TokenOfTile token = token_of_tile<gate_up>(p, tile.run.first + row);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const float (&first)[4] = sum[i / 2][j];
        const float (&second)[4] = sum[i / 2][2 + j];
        const int at = i % 2 * 2;
        finish_pairs<gate_up>(p, token, tile.first_pair, MmaShape::kPairs, warp_column * 16 + j * 8 + lane % 4 * 2,
                              scales[j], {{first[at], first[at + 1]}, {second[at], second[at + 1]}});
      }
    }
  }
  copy_async_wait<0>();
}

}  // namespace glm
