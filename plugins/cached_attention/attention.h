// CachedAttention on a CPU: the call, and the table of inner loops that each instruction set fills in.
//
// Further letters: G = H / J query heads that share a key/value head; a row is one query head of one token. The rows of
// a token block are cut into tiles of `lanes` rows, and the lanes of a vector are the rows of a tile: scores of one
// position are one vector, so softmax needs no horizontal step, and a key is read once, as it lies, for all its heads.
#pragma once

#include "plugins/cpu/kernel.h"

namespace glm {

struct CachedAttention {
  size_t B, S, H, J, C, A, R;
  Type type;    // of q, k, v, the caches and out
  float scale;  // of the scores

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

  // Bytes that run() wants as scratch, 64-byte aligned.
  size_t scratch_bytes(Isa isa) const;
  void run(Isa isa, const Parallel& parallel, void* scratch) const;
};

// The inner loops for one element type T. Keys and values arrive in blocks of consecutive positions.
struct AttentionLoops {
  size_t lanes;
  // Whether scores() takes float keys, and accumulate() float values, made by widen(), instead of T.
  bool wide_keys;
  bool wide_values;

  // y = RoPE of x, rounded to T.
  void (*rotate)(const void* x,     // [A]
                 const float* cos,  // [R]
                 const float* sin,  // [R]
                 size_t R, size_t A,
                 void* y);  // [A]
  void (*widen)(const void* x, size_t n, float* y);
  // y = x * factor, rounded to T.
  void (*narrow)(const float* x, float factor, size_t n, void* y);
  // Queries as scores() wants them: rows become lanes, missing rows are zero.
  void (*pack)(const void* q,  // [rows, A]
               size_t rows, size_t A,
               void* packed);  // [A, lanes] of float
  // Products of every key with every query. `ahead` is what the caller reads next: it is prefetched on the way.
  void (*scores)(const void* packed,  // [A, lanes]
                 const void* keys,    // [positions, A]
                 size_t positions, size_t A, const char* ahead,
                 float* scores);  // [positions, lanes]
  // Online softmax: scores become exp2(factor * (score - max)) with the running maximum, which is updated, and `sum`
  // too; `decay` is what everything summed under the old maximum is to be multiplied by. Lane i sees the first seen[i]
  // positions; null: all see all.
  void (*softmax)(float* scores,  // [positions, lanes]
                  size_t positions, const int32_t* seen, float factor,
                  float* max,     // [lanes]
                  float* sum,     // [lanes]
                  float* decay);  // [lanes]
  // out = out * decay + probabilities^T values
  void (*accumulate)(const float* probabilities,  // [positions, lanes]
                     const float* decay,          // [lanes]
                     const void* values,          // [positions, A]
                     size_t rows, size_t positions, size_t A, const char* ahead,
                     float* out);  // [rows, A]
};

// The loops for an element type where a task has at most `rows` rows.
const AttentionLoops& attention_scalar(Type type);
const AttentionLoops& attention_avx2(Type type, size_t rows);

}  // namespace glm
