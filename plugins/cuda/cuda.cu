// What the library says about itself, and its error codes in words.
#include <cstdio>
#include <iterator>

#include "plugins/cuda/check.h"
#include "plugins/cuda/device.cuh"

namespace glm {
namespace {

#define GLM_CUDA_TEXT(name) #name,
const char* const kArguments[] = {"", GLM_CUDA_ARGUMENTS(GLM_CUDA_TEXT)};
#undef GLM_CUDA_TEXT

#define GLM_CUDA_TEXT(name, text) text,
const char* const kFaults[] = {"", GLM_CUDA_FAULTS(GLM_CUDA_TEXT)};
#undef GLM_CUDA_TEXT

}  // namespace

#ifndef GLM_EMULATE
const char* runtime_error_text(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }
#endif

}  // namespace glm

extern "C" int32_t glm_cuda_abi(void) { return GLM_CUDA_ABI; }

extern "C" const char* glm_cuda_error(int32_t code) {
  if (code == 0) return "no error";
  if (code >= glm::kRuntimeError) return glm::runtime_error_text(code - glm::kRuntimeError);
  const auto argument = static_cast<size_t>(code / 16), fault = static_cast<size_t>(code % 16);
  if (code < 16 || argument >= std::size(glm::kArguments) || fault < 1 || fault >= std::size(glm::kFaults)) {
    return "an unknown error code";
  }
  thread_local char text[64];
  std::snprintf(text, sizeof text, "%s %s", glm::kArguments[argument], glm::kFaults[fault]);
  return text;
}
