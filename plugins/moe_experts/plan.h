// What a call of the expert kernels launches, as a function of sizes and device alone: nothing here depends on which
// experts the tokens chose, so that a CUDA graph can hold the call. Host code that needs no GPU.
//
//   group      tokens by expert, and E4M3: quantize hidden        group.cuh, quantize.cuh
//   gate_up    h = silu(gate x) * (up x)                          decode.cuh | mma.cuh | wgmma.cuh
//   quantize   E4M3 only: h                                       quantize.cuh
//   down       y = down h                                         decode.cuh | mma.cuh | wgmma.cuh
//   combine    out = sum over k of weight_k y_k                   combine.cuh
//
// An assignment is a pair (token, choice), number t K + k. Sorted by expert, assignments stand at positions; a run is a
// stretch of positions of one expert, short enough for one tile of a kernel.
#pragma once

#include <algorithm>
#include <cstdint>

#include "plugins/cuda/device.cuh"
#include "plugins/cuda/launch.h"

namespace glm {

struct Run {
  int32_t expert, first, count, unused;
};

struct ExpertSizes {
  int64_t T, D, F, E, K;
  int hidden_type, weight_type;

  bool quantized() const { return weight_type == GLM_CUDA_E4M3; }
  int64_t assignments() const { return T * K; }
};

inline int64_t bytes_of(int type) { return type == GLM_CUDA_F32 ? 4 : type == GLM_CUDA_E4M3 ? 1 : 2; }

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Offsets into the workspace. None of them depends on the path, and all grow with T.
struct ExpertWorkspace {
  int64_t run_count, runs, order, x, x_scale, h, h_quantized, h_scale, y, bytes;

  explicit ExpertWorkspace(const ExpertSizes& s) : bytes(0) {
    const int64_t A = s.assignments(), quantized = s.quantized();
    run_count = take(sizeof(int32_t));
    runs = take(A * static_cast<int64_t>(sizeof(Run)));  // no run is empty
    order = take(A * static_cast<int64_t>(sizeof(int32_t)));
    x = take(quantized * s.T * s.D);
    x_scale = take(quantized * s.T * static_cast<int64_t>(sizeof(float)));
    h = take(A * s.F * bytes_of(s.hidden_type));
    h_quantized = take(quantized * A * s.F);
    h_scale = take(quantized * A * static_cast<int64_t>(sizeof(float)));
    y = take(A * s.D * static_cast<int64_t>(sizeof(float)));
  }

 private:
  int64_t take(int64_t size) {
    const int64_t at = bytes;
    bytes += ceil_div(size, 256) * 256;
    return at;
  }
};

// The decode kernel's block: 16 warps. A warp has 8 pairs of weight rows in hand and one of `splits` parts of their
// length; `depth` chunks of 1 KiB are on their way to it. The block keeps the operand rows of `tokens` tokens.
struct DecodeShape {
  static constexpr int kWarps = 16, kPairs = 8, kChunk = 64, kMostTokens = 16, kScales = kWarps * kPairs * 2;

  int tokens, row_stride, splits, depth;

  __host__ __device__ int teams() const { return kWarps / splits; }
  // Of shared memory: operand rows, partial sums, what is known of the tokens, scales of weight rows, rings.
  int64_t partial_bytes() const { return kWarps * ceil_div(tokens, 8) * 4 * 32 * static_cast<int64_t>(sizeof(float)); }
  int64_t shared_bytes() const {
    return tokens * row_stride + partial_bytes() + kMostTokens * 8 + kScales * static_cast<int64_t>(sizeof(float)) +
           kWarps * depth * 1024;
  }
};

inline DecodeShape decode_shape(const ExpertSizes& s, int64_t row_bytes, int tokens, int depth) {
  DecodeShape shape{};
  shape.tokens = static_cast<int>(std::min<int64_t>(tokens, s.T));
  shape.depth = depth;
  const int64_t chunks = ceil_div(row_bytes, DecodeShape::kChunk);
  // Rows that begin 64 bytes apart modulo 128 let 8 lanes read 16 bytes each from two of them without a bank conflict.
  shape.row_stride = static_cast<int>(ceil_div(chunks * DecodeShape::kChunk - 64, 128) * 128 + 64);
  // As many parts as the length goes into almost evenly.
  shape.splits = DecodeShape::kWarps;
  while (shape.splits > 1 && chunks * 10 < ceil_div(chunks, shape.splits) * shape.splits * 9) shape.splits /= 2;
  return shape;
}

// One of the two products, on a grid of blocks that share `tiles` column tiles of every run among themselves.
struct ProductPlan {
  int64_t tiles, blocks, shared_bytes;
  DecodeShape decode;  // of the decode path
};

struct ExpertPlan {
  int path, run_tokens;
  ProductPlan gate_up, down;
};

// Columns of a tile come in pairs: of gate and up one each, or two columns of down. Threads, rows and pairs of a tile.
struct MmaShape {
  static constexpr int kThreads = 256, kRows = 128, kPairs = 64, kStages = 3;
  static constexpr int64_t kSharedBytes = kStages * (kRows + 2 * kPairs) * 128;
};
struct WgmmaShape {
  static constexpr int kThreads = 384, kRows = 128, kPairs = 128, kStages = 4;
  static constexpr int64_t kSharedBytes = kStages * (kRows + 2 * kPairs) * 128 + kStages * 16;
};

inline int64_t column_tiles(const ExpertSizes& s, bool gate_up, int64_t pairs) {
  return gate_up ? ceil_div(s.F, pairs) : ceil_div(s.D, 2 * pairs);
}

// The most runs there can be: every expert may end with one that is not full.
inline int64_t most_runs(const ExpertSizes& s, int64_t run_tokens) {
  const int64_t A = s.assignments();
  return std::min(A, A / run_tokens + std::min(A, s.E));
}

inline ProductPlan product_plan(const ExpertSizes& s, const Device& device, int64_t tiles, int64_t run_tokens,
                                int64_t shared_bytes) {
  const int64_t blocks = std::min<int64_t>(device.multiprocessors, most_runs(s, run_tokens) * tiles);
  return {tiles, blocks, shared_bytes, {}};
}

// Kernels count the tiles of all runs in 32 bits, and have the device's shared memory.
inline bool fits(const ExpertSizes& s, const Device& device, const ExpertPlan& plan) {
  const int64_t tiles = most_runs(s, plan.run_tokens) * std::max(plan.gate_up.tiles, plan.down.tiles);
  return tiles < int64_t{1} << 30 && std::max(plan.gate_up.shared_bytes, plan.down.shared_bytes) <= device.shared_bytes;
}

// Few tokens per expert: the weights' way from memory is what takes time.
inline bool is_decode(const ExpertSizes& s) { return s.T <= 64 || s.assignments() <= 8 * s.E; }

// False where the device's shared memory is too small for rows of this length.
inline bool plan_decode(const ExpertSizes& s, const Device& device, ExpertPlan& plan) {
  // Tokens that share one pass over an expert's weights, before chunks in flight: 2 of them are 32 KiB already.
  constexpr int kChoices[][2] = {{16, 8}, {16, 4}, {8, 8}, {8, 4}, {8, 2}, {4, 4}, {4, 2}, {2, 2}, {1, 2}};
  const int64_t width = bytes_of(s.weight_type);
  for (const auto& choice : kChoices) {
    const DecodeShape gate_up = decode_shape(s, s.D * width, choice[0], choice[1]);
    const DecodeShape down = decode_shape(s, s.F * width, choice[0], choice[1]);
    plan.run_tokens = gate_up.tokens;
    const auto product = [&](const DecodeShape& shape, bool is_gate_up) {
      const int64_t tiles = ceil_div(column_tiles(s, is_gate_up, DecodeShape::kPairs), shape.teams());
      ProductPlan product = product_plan(s, device, tiles, plan.run_tokens, shape.shared_bytes());
      product.decode = shape;
      return product;
    };
    plan.gate_up = product(gate_up, true);
    plan.down = product(down, false);
    if (fits(s, device, plan)) return true;
  }
  return false;
}

template <class Shape>
bool plan_tiles(const ExpertSizes& s, const Device& device, ExpertPlan& plan) {
  plan.run_tokens = Shape::kRows;
  const auto product = [&](bool gate_up) {
    return product_plan(s, device, column_tiles(s, gate_up, Shape::kPairs), Shape::kRows, Shape::kSharedBytes);
  };
  plan.gate_up = product(true);
  plan.down = product(false);
  return fits(s, device, plan);
}

// False where `path` can not be had for these sizes on this device.
inline bool plan_experts(const ExpertSizes& s, const Device& device, int path, ExpertPlan& plan) {
  plan.path = path;
  switch (path) {
    case GLM_CUDA_PATH_DECODE:
      return plan_decode(s, device, plan);
    case GLM_CUDA_PATH_MMA:
      return plan_tiles<MmaShape>(s, device, plan);
    case GLM_CUDA_PATH_WGMMA:
      return device.sm == 90 && plan_tiles<WgmmaShape>(s, device, plan);
    default:
      if (is_decode(s) && plan_experts(s, device, GLM_CUDA_PATH_DECODE, plan)) return true;
      return plan_experts(s, device, device.sm == 90 ? GLM_CUDA_PATH_WGMMA : GLM_CUDA_PATH_MMA, plan);
  }
}

}  // namespace glm
