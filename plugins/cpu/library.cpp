// What the shared library exports: ONNX Runtime calls RegisterCustomOps, Python asks glm_kernels what it would get and
// glm_work what was done.
#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <deque>
#include <string>

#include "plugins/cpu/op.h"

namespace glm {
namespace {

using namespace ort;  // NOLINT(google-build-using-namespace): this file is the border

constexpr const char* kDomain = "glm";

// An op with the type of every operand fixed, as ONNX Runtime knows it.
struct TypedOp : OrtCustomOp {
  TypedOp(const Op& op, std::vector<Type> input_types);
  const Op& op;
  const std::vector<Type> input_types;
  std::vector<Type> output_types;
};

// A kernel with what it takes to run it.
struct LiveKernel {
  const OrtApi* api;
  const Op& op;
  const Known known;
  const std::unique_ptr<Kernel> kernel;
};

// Runs a body that may throw; what it throws becomes a status that begins with `where`.
template <class Body>
OrtStatus* guarded(const OrtApi* api, const char* where, const Body& body) {
  try {
    try {
      body();
      return nullptr;
    } catch (const Error& error) {
      return CreateStatus(api, kInvalidArgument, (std::string(where) + ": " + error.what()).c_str());
    } catch (const std::exception& error) {
      return CreateStatus(api, kFail, (std::string(where) + ": " + error.what()).c_str());
    }
  } catch (...) {  // something that is no exception of ours, or no memory even for the sentence
    return CreateStatus(api, kFail, where);
  }
}

const TypedOp& typed(const OrtCustomOp* op) { return *static_cast<const TypedOp*>(op); }

// The index of an input by its name.
size_t input_index(const Op& op, const char* name) {
  for (size_t i = 0; i < op.inputs.size(); ++i) {
    if (!std::strcmp(op.inputs[i].name, name)) return i;
  }
  throw std::logic_error(std::string(op.name) + " has no input " + name);
}

std::vector<Type> members(Types types) {
  std::vector<Type> result;
  for (Type type : {Type::f32, Type::i32, Type::i64, Type::f16, Type::bf16, Type::e4m3}) {
    if (types & only(type)) result.push_back(type);
  }
  return result;
}

TypedOp::TypedOp(const Op& op, std::vector<Type> types) : OrtCustomOp{}, op(op), input_types(std::move(types)) {
  for (const Operand& output : op.outputs) {
    const std::vector<Type> own = members(output.types);
    if (!output.like && own.size() != 1) throw std::logic_error(std::string(op.name) + ": type of an output is open");
    output_types.push_back(output.like ? input_types[input_index(op, output.like)] : own[0]);
  }
  version = kVersion;
  GetName = [](const OrtCustomOp* self) { return typed(self).op.name; };
  GetExecutionProviderType = [](const OrtCustomOp*) -> const char* { return nullptr; };
  GetInputTypeCount = [](const OrtCustomOp* self) { return typed(self).input_types.size(); };
  GetInputType = [](const OrtCustomOp* self, size_t i) { return static_cast<int>(typed(self).input_types[i]); };
  GetOutputTypeCount = [](const OrtCustomOp* self) { return typed(self).output_types.size(); };
  GetOutputType = [](const OrtCustomOp* self, size_t i) { return static_cast<int>(typed(self).output_types[i]); };
  GetInputCharacteristic = [](const OrtCustomOp* self, size_t i) {
    return typed(self).op.inputs[i].optional ? kOptional : kRequired;
  };
  GetOutputCharacteristic = [](const OrtCustomOp* self, size_t i) {
    return typed(self).op.outputs[i].optional ? kOptional : kRequired;
  };
  GetInputMemoryType = [](const OrtCustomOp*, size_t) { return kDefaultMemory; };
  GetVariadicInputMinArity = GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 1; };
  GetVariadicInputHomogeneity = GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 1; };
  CreateKernelV2 = [](const OrtCustomOp* self, const OrtApi* api, const OrtKernelInfo* info, void** kernel) {
    const Op& op = typed(self).op;
    return guarded(api, op.name, [&] { *kernel = new LiveKernel{api, op, {api, info, op}, op.make(Node(api, info))}; });
  };
  KernelComputeV2 = [](void* kernel, OrtKernelContext* context) {
    const LiveKernel& live = *static_cast<LiveKernel*>(kernel);
    const auto start = std::chrono::steady_clock::now();
    OrtStatus* status = guarded(live.api, live.op.name, [&] {
      Run run(live.api, context, live.op, live.known);
      live.kernel->compute(run);
    });
    work().nanoseconds +=
        static_cast<uint64_t>(std::chrono::nanoseconds(std::chrono::steady_clock::now() - start).count());
    return status;
  };
  KernelDestroy = [](void* kernel) { delete static_cast<LiveKernel*>(kernel); };
}

// Adds the op once per combination of its inputs' types.
void add_combinations(const Op& op, std::deque<TypedOp>& to) {
  std::vector<std::vector<Type>> combinations{{}};
  for (const Operand& input : op.inputs) {
    std::vector<std::vector<Type>> longer;
    for (const std::vector<Type>& types : combinations) {
      const auto choices = input.like ? std::vector<Type>{types.at(input_index(op, input.like))} : members(input.types);
      for (Type type : choices) {
        longer.push_back(types);
        longer.back().push_back(type);
      }
    }
    combinations = std::move(longer);
  }
  for (std::vector<Type>& types : combinations) to.emplace_back(op, std::move(types));
}

void check(const OrtApi* api, OrtStatus* status) {
  if (!status) return;
  const std::string message = GetErrorMessage(api, status);
  ReleaseStatus(api, status);
  throw Error(message);
}

// The domain with all ops. It belongs to no session and lives as long as the process, like this library.
OrtCustomOpDomain* domain(const OrtApi* api) {
  static std::deque<TypedOp> typed_ops;  // ONNX Runtime keeps their addresses
  static OrtCustomOpDomain* const domain = [api] {
    std::sort(ops().begin(), ops().end(), [](const Op& a, const Op& b) { return std::strcmp(a.name, b.name) < 0; });
    OrtCustomOpDomain* made = nullptr;
    check(api, CreateCustomOpDomain(api, kDomain, &made));
    for (const Op& op : ops()) add_combinations(op, typed_ops);
    for (const TypedOp& op : typed_ops) check(api, CustomOpDomain_Add(api, made, &op));
    return made;
  }();
  return domain;
}

}  // namespace
}  // namespace glm

#define GLM_EXPORT extern "C" __attribute__((visibility("default")))

GLM_EXPORT glm::ort::OrtStatus* RegisterCustomOps(glm::ort::OrtSessionOptions* options,
                                                  const glm::ort::OrtApiBase* base) {
  using namespace glm;  // NOLINT(google-build-using-namespace)
  const ort::OrtApi* api = base->GetApi(ort::kVersion);
  if (!api) {
    const std::string message = std::string("glm-export's kernels need onnxruntime 1.") +
                                std::to_string(ort::kVersion) + " or newer, this is " + base->GetVersionString() + ".";
    return ort::CreateStatus(base->GetApi(ort::kOldest), ort::kFail, message.c_str());
  }
  return guarded(api, "glm-export's kernels", [&] {
    isa();  // a wrong GLM_EXPORT_CPU is refused here, before any kernel asks
    check(api, ort::AddCustomOpDomain(api, options, domain(api)));
  });
}

// The instruction set and the ops that have a kernel, as "avx2 MoERouter RMSNorm"; empty if GLM_EXPORT_CPU is wrong.
GLM_EXPORT const char* glm_kernels() {
  thread_local std::string text;
  try {
    text = glm::name_of(glm::isa());
    for (const glm::Op& op : glm::ops()) text += std::string(" ") + op.name;
  } catch (const std::exception&) {
    text.clear();
  }
  return text.c_str();
}

// What the kernels have done so far, see Work.
GLM_EXPORT void glm_work(uint64_t* nanoseconds, uint64_t* experts) {
  *nanoseconds = glm::work().nanoseconds;
  *experts = glm::work().experts;
}
