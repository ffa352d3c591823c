// The part of the C++ plugins that needs no TensorRT, for a test through ctypes.
#include <cstring>

#include "plugins/tensorrt/call.h"

using namespace glm::trt;

// One call of an op, with a workspace at 2**20 on stream 5. Returns what is wrong; empty if nothing is.
//   types: of the inputs, as Type. dims: of all operands, one after another. ranks, addresses: of all operands.
//   fields: the given fields; kinds: 0 integer, 1 real, 2 anything else.
extern "C" __attribute__((visibility("default"))) const char* glue_call(
    const char* name, const int32_t* types, const int64_t* dims, const int32_t* ranks, void* const* addresses,
    const char* const* field_names, const void* const* field_data, const int32_t* field_kinds,
    const int32_t* field_lengths, int32_t field_count) {
  static Problem problem;
  problem = Problem();
  const Op* op = nullptr;
  for (const Op& candidate : kOps) {
    if (!std::strcmp(candidate.name, name)) op = &candidate;
  }
  if (!op) return "no such op";
  GivenField given[8];
  for (int i = 0; i < field_count; ++i) {
    given[i] = {field_names[i], field_data[i], field_kinds[i] == 0, field_kinds[i] == 1, field_lengths[i]};
  }
  const Numbers numbers = read_fields(*op, given, field_count, problem);
  Type inputs[kMaxInputs];
  Shape shapes[kMaxInputs + kMaxOutputs];
  const int input_count = count(op->inputs), all = input_count + count(op->outputs);
  for (int i = 0; i < all; dims += ranks[i++]) {
    shapes[i] = {dims, ranks[i]};
    if (i < input_count) inputs[i] = static_cast<Type>(types[i]);
  }
  const Call call{*op, sizes(*op, shapes, all, numbers, problem), numbers, variable_type(*op, inputs, problem)};
  if (!problem) {
    launch(call, addresses, addresses + input_count, reinterpret_cast<void*>(1 << 20), reinterpret_cast<void*>(5),
           problem);
  }
  return problem.text;
}
