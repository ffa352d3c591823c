// A product for many tokens per expert, the part that does not depend on the tensor cores' instructions: which bytes go
// where in shared memory.
//
// A tile is kRows tokens of a run times kPairs pairs of weight rows. Blocks take tiles in turn, the column tiles of a
// run one after the other, so that blocks at work at the same time share tokens and weights in the second-level cache.
// The rows pass through shared memory in stages of 128 bytes of their length: first the tokens' rows, gathered through
// the order of the assignments, then the first and the second weight row of every pair. 16-byte vector v of row r is at
// place v ^ (r % 8) of its 128 bytes, the "128-byte swizzle": no bank conflicts, and what wgmma expects.
#pragma once

#include "plugins/moe_experts/operand.cuh"
#include "plugins/moe_experts/product.cuh"

namespace glm {

constexpr int kStageWidth = 128;

template <class Shape>
constexpr int kStageBytes = (Shape::kRows + 2 * Shape::kPairs) * kStageWidth;

__device__ __forceinline__ int swizzled(int row, int vector) { return row * kStageWidth + ((vector ^ (row % 8)) * 16); }

__device__ __forceinline__ int stages_of_row(const Product& p) { return (p.row_bytes + kStageWidth - 1) / kStageWidth; }

struct Tile {
  Run run;
  int first_pair;
};

template <class Shape>
__device__ __forceinline__ Tile tile_at(const Product& p, int number) {
  return {p.runs[number / p.tiles], number % p.tiles * Shape::kPairs};
}

// A thread's share in the copies of all stages of the block's tiles, as `kThreads` threads make them.
template <class Shape, bool gate_up, int kThreads>
class TileStream {
 public:
  __device__ __forceinline__ TileStream(const Product& p, int thread)
      : p_(p),
        row_(thread / 8),
        vector_(thread % 8),
        tile_(static_cast<int>(blockIdx.x)),
        end_(*p.run_count * p.tiles) {
    find_rows();
  }

  __device__ __forceinline__ bool has_more() const { return tile_ < end_; }

  // Starts to copy the next stage, if there is one.
  __device__ __forceinline__ void copy_next(unsigned char* stage) {
    if (!has_more()) return;
    const bool inside = at_ < p_.row_bytes;
    unsigned char* to = stage + swizzled(row_, vector_);  // rows that are a multiple of 8 apart have the same places
#pragma unroll
    for (int i = 0; i < kTokenCopies; ++i) {
      const bool valid = inside && token_rows_[i] >= 0;
      copy_async_16(to + i * kStep * kStageWidth, valid ? token(token_rows_[i]) : p_.rows, valid);
    }
    to += Shape::kRows * kStageWidth;
#pragma unroll
    for (int i = 0; i < kWeightCopies; ++i) {
      const int half = i * kStep / Shape::kPairs;
      const int row = weight_row<gate_up>(p_, first_pair_, Shape::kPairs, half, i * kStep % Shape::kPairs + row_);
      const bool valid = inside && row < half_end<gate_up>(p_, half);
      copy_async_16(to + i * kStep * kStageWidth,
                    expert_ + (valid ? static_cast<size_t>(row) * static_cast<size_t>(p_.row_bytes) + at_ : 0), valid);
    }
    at_ += kStageWidth;
    if (at_ >= stages_of_row(p_) * kStageWidth) {
      tile_ += static_cast<int>(gridDim.x);
      find_rows();
    }
  }

 private:
  static constexpr int kStep = kThreads / 8;  // rows that all threads copy at once
  static constexpr int kTokenCopies = Shape::kRows / kStep, kWeightCopies = 2 * Shape::kPairs / kStep;
  static_assert(kStep % 8 == 0 && Shape::kPairs % kStep == 0 && Shape::kRows % kStep == 0);

  __device__ __forceinline__ const unsigned char* token(int row) const {
    return p_.rows + static_cast<size_t>(row) * static_cast<size_t>(p_.row_bytes) + at_;
  }

  __device__ __forceinline__ void find_rows() {
    at_ = vector_ * 16;
    if (!has_more()) return;
    const Tile tile = tile_at<Shape>(p_, tile_);
    first_pair_ = tile.first_pair;
    expert_ = p_.weight + static_cast<size_t>(tile.run.expert) * static_cast<size_t>(expert_rows<gate_up>(p_)) *
                              static_cast<size_t>(p_.row_bytes);
#pragma unroll
    for (int i = 0; i < kTokenCopies; ++i) {
      const int row = i * kStep + row_, position = tile.run.first + row;
      token_rows_[i] = row < tile.run.count ? operand_row<gate_up>(p_, position, p_.order[position]) : -1;
    }
  }

  const Product& p_;
  const int row_, vector_;
  int tile_, end_, at_, first_pair_ = 0;
  const unsigned char* expert_ = nullptr;
  int token_rows_[kTokenCopies];
};

}  // namespace glm
