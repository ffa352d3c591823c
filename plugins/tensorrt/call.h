// A plugin's call as a call of plugins/cuda/launch.h: which operand, size and type goes where.
#pragma once

#include <cstdint>

#include "plugins/tensorrt/signature.h"

namespace glm::trt {

struct Call {
  const Op& op;
  Sizes sizes;
  Numbers numbers;
  Type type;  // of the tensors with a choice
};

// The workspace that an op needs for these sizes, or fewer tokens; 0 with a problem if there is no kernel for them.
int64_t workspace_bytes(const Call& call, Problem& problem);

// Puts an op on the stream. Pointers are device memory, in the order of the table.
void launch(const Call& call, const void* const* inputs, void* const* outputs, void* workspace, void* stream,
            Problem& problem);

}  // namespace glm::trt
