// A product for few tokens per expert: the weights are read once, as fast as memory gives them.
//
// Grid: at most one block per SM. The column tiles of all runs stand in one line, the blocks share it evenly. A block
// keeps its run's tokens in shared memory. Its 16 warps are `teams` of `splits`: a team takes eight pairs of weight
// rows as the 16 rows of a tensor core's product (rows 0-7 the first, 8-15 the second of each pair, so that one thread
// ends up with both), the tokens are its 8 columns; a warp of the team takes its part of the rows' length.
//
// Weights come through a ring of asynchronous copies that runs on over the ends of tiles and runs: a thread copies just
// the 2 x 16 bytes that it multiplies itself, so the ring needs no barrier. How elements are numbered within a sum is
// free: a lane's 16 bytes of a row are 8 (or 16) neighbours, and the tokens are read in the same way.
#pragma once

#include "plugins/moe_experts/operand.cuh"
#include "plugins/moe_experts/product.cuh"

namespace glm {

// The line of tiles, and a lane's way along it.
template <bool gate_up>
class WeightStream {
 public:
  __device__ __forceinline__ WeightStream(const Product& p, const DecodeShape& shape, int team, int split, int lane,
                                          int tile, int end)
      : p_(p), row_of_lane_(lane / 4), tile_(tile), end_(end) {
    const int chunks = (p.row_bytes + DecodeShape::kChunk - 1) / DecodeShape::kChunk;
    // Bytes of a row: the warp's part, where this lane's 16 of every chunk are.
    begin_ = chunks * split / shape.splits * DecodeShape::kChunk + lane % 4 * 16;
    part_end_ = chunks * (split + 1) / shape.splits * DecodeShape::kChunk;
    team_ = team;
    teams_ = shape.teams();
    at_ = begin_;
    if (tile_ < end_ && begin_ < part_end_) find_rows();
  }

  // Starts to copy the next chunk, if there is one, and closes a group in any case.
  __device__ __forceinline__ void copy_next(unsigned char* slot, int lane) {
    if (tile_ < end_ && begin_ < part_end_) {
      const bool inside = at_ < p_.row_bytes;
      copy_async_16(slot + lane * 16, rows_[0] + (inside ? at_ : 0), inside && valid_[0]);
      copy_async_16(slot + 512 + lane * 16, rows_[1] + (inside ? at_ : 0), inside && valid_[1]);
      at_ += DecodeShape::kChunk;
      if (at_ >= part_end_) {
        at_ = begin_;
        if (++tile_ < end_) find_rows();
      }
    }
    copy_async_commit();
  }

 private:
  __device__ __forceinline__ void find_rows() {
    const Run run = p_.runs[tile_ / p_.tiles];
    const int pair = (tile_ % p_.tiles * teams_ + team_) * DecodeShape::kPairs;
    const unsigned char* expert = p_.weight + static_cast<size_t>(run.expert) *
                                                  static_cast<size_t>(expert_rows<gate_up>(p_)) *
                                                  static_cast<size_t>(p_.row_bytes);
    for (int half = 0; half < 2; ++half) {
      const int row = weight_row<gate_up>(p_, pair, DecodeShape::kPairs, half, row_of_lane_);
      valid_[half] = row < half_end<gate_up>(p_, half);
      rows_[half] = expert + (valid_[half] ? static_cast<size_t>(row) * static_cast<size_t>(p_.row_bytes) : 0);
    }
  }

  const Product& p_;
  int row_of_lane_, tile_, end_, begin_, part_end_, team_, teams_, at_;
  const unsigned char* rows_[2];
  bool valid_[2];
};

// Waits for the oldest of `depth` groups.
__device__ __forceinline__ void wait_for_oldest(int depth) {
  if (depth == 8) {
    copy_async_wait<7>();
  } else if (depth == 4) {
    copy_async_wait<3>();
  } else {
    copy_async_wait<1>();
  }
}

template <class T, bool gate_up>
__global__ void __launch_bounds__(DecodeShape::kWarps * 32, 1) decode_kernel(const Product p, const DecodeShape shape) {
  // `down` asks for its first weights while the kernels before it still work on h. For that it needs the runs, and they
  // are there: all blocks of gate_up let the next kernel start only behind their own wait for `group`.
  if (gate_up) wait_for_previous_kernel();
  start_next_kernel();
  constexpr int kThreads = DecodeShape::kWarps * 32, kTokenTiles = DecodeShape::kMostTokens / 8;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int team = warp / shape.splits, split = warp % shape.splits, teams = shape.teams();

  unsigned char* tokens = shared_memory();
  auto* partial = reinterpret_cast<float*>(tokens + shape.tokens * shape.row_stride);
  const int token_tiles = (shape.tokens + 7) / 8;
  auto* assignments = reinterpret_cast<int*>(partial + DecodeShape::kWarps * token_tiles * 128);
  auto* token_scales = reinterpret_cast<float*>(assignments + DecodeShape::kMostTokens);
  float* weight_scales = token_scales + DecodeShape::kMostTokens;  // [team, half, 8]
  auto* rings = reinterpret_cast<unsigned char*>(weight_scales + DecodeShape::kScales);
  unsigned char* ring = rings + warp * shape.depth * 1024;

  const int64_t line = static_cast<int64_t>(*p.run_count) * p.tiles;
  const int begin = static_cast<int>(line * blockIdx.x / gridDim.x);
  const int end = static_cast<int>(line * (blockIdx.x + 1) / gridDim.x);
  WeightStream<gate_up> stream(p, shape, team, split, lane, begin, end);
  for (int i = 0; i < shape.depth - 1; ++i) stream.copy_next(ring + i * 1024, lane);
  int slot = 0;
  if (!gate_up) wait_for_previous_kernel();

  const int chunks = (p.row_bytes + DecodeShape::kChunk - 1) / DecodeShape::kChunk;
  const int first_chunk = chunks * split / shape.splits, end_chunk = chunks * (split + 1) / shape.splits;
  for (int tile = begin; tile < end; ++tile) {
    const Run run = p.runs[tile / p.tiles];
    if (tile == begin || tile % p.tiles == 0) {
      // The run's tokens; behind the end of a row zeros, which meet the zeros of the weights there.
      const int vectors = chunks * (DecodeShape::kChunk / 16);
      for (int i = thread; i < run.count * vectors; i += kThreads) {
        const int token = i / vectors, at = i % vectors * 16, position = run.first + token;
        uint4 value = {0, 0, 0, 0};
        if (at < p.row_bytes) {
          const int row = operand_row<gate_up>(p, position, p.order[position]);
          value = *reinterpret_cast<const uint4*>(p.rows + static_cast<size_t>(row) * static_cast<size_t>(p.row_bytes) +
                                                  at);
        }
        *reinterpret_cast<uint4*>(tokens + token * shape.row_stride + at) = value;
      }
      if (thread < run.count) {
        const int position = run.first + thread, assignment = p.order[position];
        assignments[thread] = assignment;
        token_scales[thread] = p.row_scale ? p.row_scale[operand_row<gate_up>(p, position, assignment)] : 1.0f;
      }
      block_sync();
    }

    const int pairs_begin = tile % p.tiles * teams * DecodeShape::kPairs;
    float weight_scale = 1.0f;  // asked for now, needed at the end
    if (p.weight_scale && thread < teams * 16) {
      const int half = thread / 8 % 2, pair = pairs_begin + thread / 16 * DecodeShape::kPairs;
      const int row = weight_row<gate_up>(p, pair, DecodeShape::kPairs, half, thread % 8);
      const size_t expert = static_cast<size_t>(run.expert) * static_cast<size_t>(expert_rows<gate_up>(p));
      if (row < half_end<gate_up>(p, half)) weight_scale = p.weight_scale[expert + static_cast<size_t>(row)];
    }

    float sum[kTokenTiles][4] = {};
    for (int chunk = first_chunk; chunk < end_chunk; ++chunk) {
      const int free_slot = slot == 0 ? shape.depth - 1 : slot - 1;
      stream.copy_next(ring + free_slot * 1024, lane);
      wait_for_oldest(shape.depth);
      const auto* weights = reinterpret_cast<const uint4*>(ring + slot * 1024);
      const uint4 low = weights[lane], high = weights[32 + lane];
      slot = slot + 1 == shape.depth ? 0 : slot + 1;
      const unsigned steps[2][4] = {{low.x, high.x, low.y, high.y}, {low.z, high.z, low.w, high.w}};
      const Exact<T> a[2] = {Exact<T>(steps[0]), Exact<T>(steps[1])};
#pragma unroll
      for (int t = 0; t < kTokenTiles; ++t) {
        if (t * 8 >= run.count) continue;
        const int token = t * 8 + lane / 4;
        uint4 x = {0, 0, 0, 0};
        if (token < run.count) {
          x = *reinterpret_cast<const uint4*>(tokens + token * shape.row_stride + chunk * DecodeShape::kChunk +
                                              lane % 4 * 16);
        }
        const unsigned b[2][2] = {{x.x, x.y}, {x.z, x.w}};
        exact_mma(sum[t], a[0], b[0]);
        exact_mma(sum[t], a[1], b[1]);
      }
    }

    // The parts of a team, added in the order of the warps.
#pragma unroll
    for (int t = 0; t < kTokenTiles; ++t) {
      if (t * 8 >= run.count) continue;
      for (int i = 0; i < 4; ++i) partial[((warp * token_tiles + t) * 4 + i) * 32 + lane] = sum[t][i];
    }
    if (thread < teams * 16) weight_scales[thread] = weight_scale;
    block_sync();
    const int used_tiles = (run.count + 7) / 8;
    for (int i = thread; i < teams * used_tiles * 64; i += kThreads) {
      const int t = i / 64 % used_tiles, of_team = i / (64 * used_tiles), second = i / 32 % 2, from = i % 32;
      const int token = t * 8 + from % 4 * 2 + second, in_tile = from / 4;
      const int pair = pairs_begin + of_team * DecodeShape::kPairs;
      const int column = weight_row<gate_up>(p, pair, DecodeShape::kPairs, 0, in_tile);
      if (token >= run.count || column >= p.columns) continue;
      float value[2] = {};
      for (int w = of_team * shape.splits; w < (of_team + 1) * shape.splits; ++w) {
        for (int half = 0; half < 2; ++half) {
          value[half] += partial[((w * token_tiles + t) * 4 + half * 2 + second) * 32 + from];
        }
      }
      for (int half = 0; half < 2; ++half) {
        value[half] *= token_scales[token] * weight_scales[of_team * 16 + half * 8 + in_tile];
      }
      if constexpr (gate_up) {
        const size_t position = static_cast<size_t>(run.first + token);
        store_rounded(p.out, position * static_cast<size_t>(p.columns) + static_cast<size_t>(column), p.out_type,
                      silu(value[0]) * value[1]);
      } else {
        float* y = static_cast<float*>(p.out) +
                   static_cast<size_t>(assignments[token]) * static_cast<size_t>(p.columns) + column;
        y[0] = value[0];
        y[DecodeShape::kPairs] = value[1];
      }
    }
    block_sync();
  }
  copy_async_wait<0>();
}

}  // namespace glm
