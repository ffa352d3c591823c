#include "plugins/tensorrt/call.h"

#include <cstring>

#include "plugins/cuda/launch.h"

namespace glm::trt {
namespace {

int32_t cuda_type(Type type) {
  switch (type) {
    case Type::f16:
      return GLM_CUDA_F16;
    case Type::bf16:
      return GLM_CUDA_BF16;
    case Type::e4m3:
      return GLM_CUDA_E4M3;
    default:
      return GLM_CUDA_F32;
  }
}

bool is(const Op& op, const char* name) { return !std::strcmp(op.name, name); }
bool is_experts(const Op& op) { return is(op, "MoEExperts") || is(op, "FP8MoEExperts"); }

void report(const Op& op, int32_t code, Problem& problem) {
  if (code) problem.say("%s: %s", op.name, glm_cuda_error(code));
}

template <class T>
const T* as(const void* pointer) {
  return static_cast<const T*>(pointer);
}

int32_t moe_router(const Call& call, const void* const* in, void* const* out, void* stream) {
  const Sizes& s = call.sizes;
  const Number* n = call.numbers.values;
  return glm_cuda_moe_router(as<float>(in[0]), as<float>(in[1]), static_cast<int32_t*>(out[0]),
                             static_cast<float*>(out[1]), s['T'], s['E'], n[0].integer, n[1].integer, n[2].integer,
                             n[3].integer, n[4].real, stream);
}

int32_t moe_experts(const Call& call, const void* const* in, void* const* out, void* workspace, int64_t bytes,
                    void* stream) {
  const Sizes& s = call.sizes;
  const bool fp8 = is(call.op, "FP8MoEExperts");
  const void* gate_up_scale = fp8 ? in[4] : nullptr;
  const void* down = fp8 ? in[5] : in[4];
  const void* down_scale = fp8 ? in[6] : nullptr;
  const int32_t type = cuda_type(call.type);
  return glm_cuda_moe_experts(in[0], as<int32_t>(in[1]), as<float>(in[2]), in[3], as<float>(gate_up_scale), down,
                              as<float>(down_scale), out[0], workspace, bytes, s['T'], s['D'], s['F'], s['E'], s['K'],
                              type, fp8 ? GLM_CUDA_E4M3 : type, GLM_CUDA_PATH_AUTO, stream);
}

int32_t fp8_cache_write(const Call& call, const void* const* in, void* const* out, void* stream) {
  const Sizes& s = call.sizes;
  return glm_cuda_fp8_cache_write(out[0], in[1], as<int32_t>(in[2]), s['B'], s['J'], s['C'], s['S'], s['A'],
                                  cuda_type(call.type), stream);
}

}  // namespace

int64_t workspace_bytes(const Call& call, Problem& problem) {
  if (!is_experts(call.op)) return 0;
  const Sizes& s = call.sizes;
  const int32_t type = cuda_type(call.type);
  const int64_t bytes = glm_cuda_moe_experts_workspace(s['T'], s['D'], s['F'], s['E'], s['K'], type,
                                                       is(call.op, "FP8MoEExperts") ? GLM_CUDA_E4M3 : type);
  if (bytes >= 0) return bytes;
  report(call.op, static_cast<int32_t>(-bytes), problem);
  return 0;
}

void launch(const Call& call, const void* const* inputs, void* const* outputs, void* workspace, void* stream,
            Problem& problem) {
  if (is(call.op, "MoERouter")) {
    report(call.op, moe_router(call, inputs, outputs, stream), problem);
  } else if (is_experts(call.op)) {
    const int64_t bytes = workspace_bytes(call, problem);
    if (!problem) report(call.op, moe_experts(call, inputs, outputs, workspace, bytes, stream), problem);
  } else if (outputs[0] != inputs[0]) {
    problem.say("%s: cache_out is not in the memory of cache; bind both to one address.", call.op.name);
  } else {
    report(call.op, fp8_cache_write(call, inputs, outputs, stream), problem);
  }
}

}  // namespace glm::trt
