// CachedAttention on a CPU: the call, and the table of inner loops that each instruction set fills in.
//
// Further letters: G = H / J query heads that share a key/value head; a row is one query head of one token. Positions
// are cut into blocks and rows into tiles. Scores are a matrix product of a tile with a block's transposed keys, whose
// vectors are consecutive positions; sums of values have vectors of consecutive columns. Either way an element of the
// tile is broadcast, so no lane is idle whatever G is, and keys and values are read once for all query heads.
#pragma once

#include "plugins/cpu/flow.h"

namespace glm {

struct CachedAttention {
  size_t B, S, H, J, C, A, R;
  Type type;        // of q, k, v and out
  Type cache_type;  // of the caches
  float scale;      // of the scores

  const void* q;               // [B, S, H, A]
  const void* k;               // [B, S, J, A]
  const void* v;               // [B, S, J, A]
  const float* cos;            // [B, S, R]
  const float* sin;            // [B, S, R]
  const void* k_cache;         // [B, J, C, A]
  const void* v_cache;         // [B, J, C, A]
  const int64_t* write_index;  // [B], within 0 .. C - S
  const int64_t* length;       // [B]
  void* out;                   // [B, S, H, A]
  void* k_cache_out;           // [B, J, C, A], may be k_cache
  void* v_cache_out;           // [B, J, C, A], may be v_cache
  float* attentions;           // [B, H, S, C] or null

  // Bytes that add() wants as scratch, 64-byte aligned.
  size_t scratch_bytes(Isa isa) const;
  // Adds the stages to a flow; returns the last one. q, k and v are there when `needs` is done; write_index and length
  // now, and what all pointers point to stays until the flow has run.
  Flow::Done add(Flow& flow, Isa isa, void* scratch, Flow::Done needs) const;
};

// Positions: whole strips of two and of three vectors of any width; keys and values stay in the first two caches.
constexpr size_t kBlock = 96;

// The inner loops for caches of one element type T. Positions are those of one block, rows those of one tile.
struct AttentionLoops {
  size_t lanes;
  size_t rows;      // of a tile, at most
  size_t strip;     // positions that are scored together, at most
  size_t per_word;  // elements of a key that share a lane of transposed keys

  void (*widen)(Type type, const void* x, size_t n, float* y);
  // RoPE in place.
  void (*rotate)(const float* cos,  // [R]
                 const float* sin,  // [R]
                 size_t R,
                 float* x);                      // [2 R]
  void (*round)(Type type, float* x, size_t n);  // in place
  void (*narrow)(Type type, const float* x, size_t n, void* y);

  // The keys of a strip as scores() wants them, filled up with any numbers.
  void (*transpose)(const void* keys,  // [positions, A] of T
                    size_t positions, size_t A,
                    float* transposed);  // [words, strip]
  // Products of every key with every query. `bytes` from `ahead` on are what the caller reads later: they are
  // prefetched on the way.
  void (*scores)(const float* q,           // [per_word, words, rows]
                 const float* transposed,  // [words, strip]
                 size_t rows, size_t words, const char* ahead, size_t bytes,
                 float* scores);  // [rows, kBlock], of which it writes [rows, strip]
  // Online softmax: scores become exp2(score - max) with the running maximum, which is updated, and the parts of `sum`
  // too; `decay` is what everything summed under the old maximum is to be multiplied by. A row sees its first seen[row]
  // positions; null: all see all.
  void (*softmax)(float* scores,        // [rows, kBlock]
                  const int32_t* seen,  // [rows]
                  size_t rows, size_t positions,
                  float* max,     // [rows]
                  float* sum,     // [rows, lanes]
                  float* decay);  // [rows]
  // sums = sums * decay + probabilities values; the loops have an order of their own for the columns.
  void (*accumulate)(const float* probabilities,  // [rows, kBlock]
                     const float* decay,          // [rows]
                     const void* values,          // [positions, A] of T
                     size_t rows, size_t positions, size_t A, const char* ahead, size_t bytes,
                     float* sums);  // [rows, A]
  // A row of sums over its sum of probabilities, the columns in order.
  void (*finish)(const float* sums,  // [A]
                 const float* sum,   // [lanes]
                 size_t A,
                 float* out);  // [A]
};

// The loops for an element type of the caches.
const AttentionLoops& attention_scalar(Type cache);
const AttentionLoops& attention_avx2(Type cache);
const AttentionLoops& attention_avx512(Type cache);

}  // namespace glm
