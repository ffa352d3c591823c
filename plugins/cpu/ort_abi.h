// The part of ONNX Runtime's C ABI that our custom ops use, declared by ourselves: no wheel ships its headers.
//
// The ABI is append-only. A table of functions keeps its order for ever, so an entry is found by its number; new ones
// only come at the end, and GetApi(version) returns nothing if the runtime is older than `version`. The same holds for
// the members of OrtCustomOp, whose `version` tells the runtime how many of them there are. The numbers below were
// counted in the public header onnxruntime_c_api.h; tests/plugins/test_library.py calls every one of them.
#pragma once

#include <cstddef>
#include <cstdint>

namespace glm::ort {

constexpr uint32_t kVersion = 24;  // the first ONNX Runtime (1.24) that has every entry named here
constexpr uint32_t kOldest = 1;    // of every ONNX Runtime there is

// What is only passed through.
struct OrtStatus;
struct OrtSessionOptions;
struct OrtCustomOpDomain;
struct OrtKernelInfo;
struct OrtKernelContext;
struct OrtValue;
struct OrtShapeInferContext;

// All enums of this ABI are ints. Element types have their ONNX numbers, as glm::Type has.
enum OrtErrorCode : int { kFail = 1, kInvalidArgument = 2 };
enum OrtCharacteristic : int { kRequired = 0, kOptional = 1 };
constexpr int kDefaultMemory = 0;

// The table of functions: as many pointers as the runtime's version has.
struct OrtApi {
  void (*entries[1])();
};

struct OrtApiBase {
  const OrtApi* (*GetApi)(uint32_t version);
  const char* (*GetVersionString)();
};

// One entry: its number in the table and its type. Called with the table first: CreateStatus(api, code, message).
template <size_t number, class Function>
struct Entry;

template <size_t number, class Result, class... Arguments>
struct Entry<number, Result(Arguments...)> {
  Result operator()(const OrtApi* api, Arguments... arguments) const {
    return reinterpret_cast<Result (*)(Arguments...)>(api->entries[number])(arguments...);
  }
};

// Those that return a status return null where all went well; whoever gets a status releases it, or hands it on.
constexpr Entry<0, OrtStatus*(OrtErrorCode code, const char* message)> CreateStatus;
constexpr Entry<2, const char*(const OrtStatus* status)> GetErrorMessage;
constexpr Entry<93, void(OrtStatus* status)> ReleaseStatus;

constexpr Entry<26, OrtStatus*(const char* name, OrtCustomOpDomain** domain)> CreateCustomOpDomain;
constexpr Entry<27, OrtStatus*(OrtCustomOpDomain* domain, const struct OrtCustomOp* op)> CustomOpDomain_Add;
constexpr Entry<28, OrtStatus*(OrtSessionOptions* options, OrtCustomOpDomain* domain)> AddCustomOpDomain;

constexpr Entry<85, OrtStatus*(const OrtKernelInfo* info, const char* name, float* value)> KernelInfoGetAttribute_float;
constexpr Entry<86, OrtStatus*(const OrtKernelInfo* info, const char* name, int64_t* value)>
    KernelInfoGetAttribute_int64;

constexpr Entry<230, OrtStatus*(const OrtKernelInfo* info, size_t* count)> KernelInfo_GetInputCount;
constexpr Entry<231, OrtStatus*(const OrtKernelInfo* info, size_t* count)> KernelInfo_GetOutputCount;
// The value belongs to the session; it is not set where the input is no constant.
constexpr Entry<249, OrtStatus*(const OrtKernelInfo* info, size_t index, int* is_constant, const OrtValue** value)>
    KernelInfoGetConstantInput_tensor;

// The value is null where an optional input is absent, or an optional output not asked for.
constexpr Entry<90, OrtStatus*(const OrtKernelContext* context, size_t index, const OrtValue** value)>
    KernelContext_GetInput;
constexpr Entry<91,
                OrtStatus*(OrtKernelContext* context, size_t index, const int64_t* dims, size_t rank, OrtValue** value)>
    KernelContext_GetOutput;
// Since 17. With at most 0 batches every index is a task of its own.
constexpr Entry<274, OrtStatus*(const OrtKernelContext* context, void (*function)(void* data, size_t index),
                                size_t count, size_t batches, void* data)>
    KernelContext_ParallelFor;

constexpr Entry<51, OrtStatus*(OrtValue* value, void** data)> GetTensorMutableData;
// Since 24. `dims` stays the value's own; null for a scalar.
constexpr Entry<414, OrtStatus*(const OrtValue* value, int* type, const int64_t** dims, size_t* rank)>
    GetTensorElementTypeAndShapeDataReference;

// A custom op as ONNX Runtime sees it. Members up to version 18, in order: null is allowed where it says so.
struct OrtCustomOp {
  uint32_t version;
  void* (*CreateKernel)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*);  // unused beside CreateKernelV2
  const char* (*GetName)(const OrtCustomOp*);
  const char* (*GetExecutionProviderType)(const OrtCustomOp*);  // returns null for the CPU
  int (*GetInputType)(const OrtCustomOp*, size_t index);
  size_t (*GetInputTypeCount)(const OrtCustomOp*);
  int (*GetOutputType)(const OrtCustomOp*, size_t index);
  size_t (*GetOutputTypeCount)(const OrtCustomOp*);
  void (*KernelCompute)(void* kernel, OrtKernelContext*);  // unused beside KernelComputeV2
  void (*KernelDestroy)(void* kernel);
  OrtCharacteristic (*GetInputCharacteristic)(const OrtCustomOp*, size_t index);
  OrtCharacteristic (*GetOutputCharacteristic)(const OrtCustomOp*, size_t index);
  int (*GetInputMemoryType)(const OrtCustomOp*, size_t index);
  int (*GetVariadicInputMinArity)(const OrtCustomOp*);  // these four only for variadic operands
  int (*GetVariadicInputHomogeneity)(const OrtCustomOp*);
  int (*GetVariadicOutputMinArity)(const OrtCustomOp*);
  int (*GetVariadicOutputHomogeneity)(const OrtCustomOp*);
  OrtStatus* (*CreateKernelV2)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*, void** kernel);
  OrtStatus* (*KernelComputeV2)(void* kernel, OrtKernelContext*);
  OrtStatus* (*InferOutputShapeFn)(const OrtCustomOp*, OrtShapeInferContext*);  // may be null, as all that follow
  int (*GetStartVersion)(const OrtCustomOp*);
  int (*GetEndVersion)(const OrtCustomOp*);
  size_t (*GetMayInplace)(int** input, int** output);
  void (*ReleaseMayInplace)(int* input, int* output);
  size_t (*GetAliasMap)(int** input, int** output);
  void (*ReleaseAliasMap)(int* input, int* output);
};

}  // namespace glm::ort
