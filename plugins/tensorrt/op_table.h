// The ops that TensorRT runs as plugins, as plugins/<op>/schema.py has them; a test compares the two. Nothing here
// needs TensorRT or CUDA.
#pragma once

#include <cstdint>

namespace glm::trt {

constexpr const char* kDomain = "glm";
constexpr const char* kVersion = "1";

enum class Type : int32_t { f32, f16, bf16, e4m3, i32 };

// A set of element types. All tensors of an op that have a choice have the same type.
using Types = uint32_t;
constexpr Types only(Type type) { return Types{1} << static_cast<int>(type); }
constexpr Types kF32 = only(Type::f32);
constexpr Types kE4m3 = only(Type::e4m3);
constexpr Types kI32 = only(Type::i32);
constexpr Types kCompute = only(Type::f32) | only(Type::bf16) | only(Type::f16);
constexpr bool is_choice(Types types) { return (types & (types - 1)) != 0; }

struct Operand {
  const char* name;
  const char* shape;  // letters with factors, as "E,2F,D"
  Types types;
  int in_place_of = -1;  // of an output: the input whose memory it has
};

enum class Kind { integer, real };

struct Field {
  const char* name;
  Kind kind;
  char letter = 0;  // the shape letter whose size it is
};

constexpr int kMaxInputs = 7;
constexpr int kMaxOutputs = 2;
constexpr int kMaxFields = 5;

struct Op {
  const char* name;
  Operand inputs[kMaxInputs];
  Operand outputs[kMaxOutputs];
  Field fields[kMaxFields];
};

constexpr Op kOps[] = {
    {"MoERouter",
     {{"logits", "T,E", kF32}, {"correction_bias", "E", kF32}},
     {{"expert_ids", "T,K", kI32}, {"expert_weights", "T,K", kF32}},
     {{"top_k", Kind::integer, 'K'},
      {"n_group", Kind::integer},
      {"topk_group", Kind::integer},
      {"norm_topk_prob", Kind::integer},
      {"routed_scaling_factor", Kind::real}}},
    {"MoEExperts",
     {{"hidden", "T,D", kCompute},
      {"expert_ids", "T,K", kI32},
      {"expert_weights", "T,K", kF32},
      {"gate_up", "E,2F,D", kCompute},
      {"down", "E,D,F", kCompute}},
     {{"out", "T,D", kCompute}},
     {}},
    {"FP8MoEExperts",
     {{"hidden", "T,D", kCompute},
      {"expert_ids", "T,K", kI32},
      {"expert_weights", "T,K", kF32},
      {"gate_up", "E,2F,D", kE4m3},
      {"gate_up_scale", "E,2F", kF32},
      {"down", "E,D,F", kE4m3},
      {"down_scale", "E,D", kF32}},
     {{"out", "T,D", kCompute}},
     {}},
    {"FP8CacheWrite",
     {{"cache", "B,J,C,A", kE4m3}, {"update", "B,J,S,A", kCompute}, {"write_index", "B", kI32}},
     {{"cache_out", "B,J,C,A", kE4m3, 0}},
     {}},
};
constexpr int kOpCount = sizeof(kOps) / sizeof(kOps[0]);

// How many entries of a table are filled.
template <class T, int N>
constexpr int count(const T (&entries)[N]) {
  int filled = 0;
  while (filled < N && entries[filled].name) ++filled;
  return filled;
}

}  // namespace glm::trt
