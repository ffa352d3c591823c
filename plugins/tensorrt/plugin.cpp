// libglm_trt_plugins.so: the ops of op_table.h as TensorRT plugins. TensorRT and TensorRT-RTX load it by its two
// exported functions; nothing of theirs is linked. There is nothing about a single op here, and plugin.py is the same
// in Python.
#include <cstdio>
#include <iterator>
#include <memory>
#include <new>

#include "NvInferRuntime.h"
#include "plugins/cuda/launch.h"
#include "plugins/tensorrt/call.h"

namespace glm::trt {
namespace {

using namespace nvinfer1;  // NOLINT(google-build-using-namespace): this file is the border

// Which kernels a plan was built for; only plans have this field.
constexpr const char* kKernelsField = "kernels";
// More fields than any node has.
constexpr int kMaxGiven = 64;

ILoggerFinder* g_logger_finder = nullptr;

// Tells the user; the return value is what TensorRT wants for a failure.
int32_t fail(const Problem& problem) {
  if (ILogger* logger = g_logger_finder ? g_logger_finder->findLogger() : nullptr) {
    logger->log(ILogger::Severity::kERROR, problem.text);
  }
  return -1;
}

constexpr struct {
  Type ours;
  DataType theirs;
} kDataTypes[] = {{Type::f32, DataType::kFLOAT},
                  {Type::f16, DataType::kHALF},
                  {Type::bf16, DataType::kBF16},
                  {Type::e4m3, DataType::kFP8},
                  {Type::i32, DataType::kINT32}};

bool to_ours(DataType theirs, Type& ours) {
  for (const auto& pair : kDataTypes) {
    if (pair.theirs == theirs) return ours = pair.ours, true;
  }
  return false;
}

DataType to_theirs(Type ours) { return kDataTypes[static_cast<int>(ours)].theirs; }

Shape shape_of(const Dims& dims) { return {dims.d, dims.nbDims}; }

class Plugin final : public IPluginV3, public IPluginV3OneCore, public IPluginV3OneBuildV2, public IPluginV3OneRuntime {
 public:
  Plugin(const Op& op, const Numbers& numbers)
      : op_(op), inputs_(count(op.inputs)), outputs_(count(op.outputs)), numbers_(numbers) {}

  // IPluginV3
  IPluginCapability* getCapabilityInterface(PluginCapabilityType kind) noexcept override {
    switch (kind) {
      case PluginCapabilityType::kCORE:
        return static_cast<IPluginV3OneCore*>(this);
      case PluginCapabilityType::kBUILD:
        return static_cast<IPluginV3OneBuildV2*>(this);
      case PluginCapabilityType::kRUNTIME:
        return static_cast<IPluginV3OneRuntime*>(this);
    }
    return nullptr;
  }
  IPluginV3* clone() noexcept override { return new (std::nothrow) Plugin(op_, numbers_); }

  // IPluginV3OneCore
  const char* getPluginName() const noexcept override { return op_.name; }
  const char* getPluginVersion() const noexcept override { return kVersion; }
  const char* getPluginNamespace() const noexcept override { return kDomain; }

  // IPluginV3OneBuild
  int32_t getNbOutputs() const noexcept override { return outputs_; }

  int32_t getOutputDataTypes(DataType* types, int32_t outputs, const DataType* given,
                             int32_t inputs) const noexcept override {
    Problem problem;
    const Type chosen = choose(given, inputs, problem);
    if (outputs != outputs_) problem.say("%s: it has %d outputs, expected %d.", op_.name, outputs, outputs_);
    if (problem) return fail(problem);
    for (int i = 0; i < outputs_; ++i) types[i] = to_theirs(output_type(op_.outputs[i].types, chosen));
    return 0;
  }

  int32_t getOutputShapes(const DimsExprs* given, int32_t inputs, const DimsExprs*, int32_t, DimsExprs* outputs,
                          int32_t output_count, IExprBuilder& builder) noexcept override {
    Problem problem;
    Dims known[kMaxInputs];
    Shape shapes[kMaxInputs];
    check_count(inputs, problem);
    if (problem || output_count != outputs_) return fail(problem);
    for (int i = 0; i < inputs_; ++i) {
      known[i].nbDims = given[i].nbDims;
      for (int k = 0; k < given[i].nbDims; ++k) {
        known[i].d[k] = given[i].d[k]->isConstant() ? given[i].d[k]->getConstantValue() : -1;
      }
      shapes[i] = shape_of(known[i]);
    }
    const Sizes sizes = trt::sizes(op_, shapes, inputs_, numbers_, problem);
    if (problem) return fail(problem);
    for (int i = 0; i < outputs_; ++i) {
      const char* rest = op_.outputs[i].shape;
      Dim dim{};
      outputs[i].nbDims = 0;
      while (next_dim(rest, dim)) {
        const int32_t size = sizes[dim.letter];
        outputs[i].d[outputs[i].nbDims++] = size < 0 ? symbol(given, dim.letter) : builder.constant(size);
      }
    }
    return 0;
  }

  int32_t getAliasedInput(int32_t output) noexcept override { return op_.outputs[output].in_place_of; }

  bool supportsFormatCombination(int32_t position, const DynamicPluginTensorDesc* tensors, int32_t,
                                 int32_t) noexcept override {
    const Types types = operand(op_, position).types;
    Type type;
    if (tensors[position].desc.format != TensorFormat::kLINEAR || !to_ours(tensors[position].desc.type, type) ||
        !(types & only(type))) {
      return false;
    }
    // Everything before has been asked for already: only the type in common is left to check.
    for (int i = 0; i < position && is_choice(types); ++i) {
      if (is_choice(operand(op_, i).types) && tensors[i].desc.type != tensors[position].desc.type) return false;
    }
    return true;
  }

  // TensorRT takes no error from getWorkspaceSize, but does from here.
  int32_t configurePlugin(const DynamicPluginTensorDesc* inputs, int32_t count, const DynamicPluginTensorDesc*,
                          int32_t) noexcept override {
    Problem problem;
    workspace(inputs, count, problem);
    return problem ? fail(problem) : 0;
  }

  size_t getWorkspaceSize(const DynamicPluginTensorDesc* inputs, int32_t count, const DynamicPluginTensorDesc*,
                          int32_t) const noexcept override {
    Problem problem;
    return static_cast<size_t>(workspace(inputs, count, problem));
  }

  // IPluginV3OneRuntime
  int32_t onShapeChange(const PluginTensorDesc*, int32_t, const PluginTensorDesc*, int32_t) noexcept override {
    return 0;  // every enqueue looks at its shapes
  }

  int32_t enqueue(const PluginTensorDesc* input_descs, const PluginTensorDesc* output_descs, const void* const* inputs,
                  void* const* outputs, void* workspace, cudaStream_t stream) noexcept override {
    Problem problem;
    DataType types[kMaxInputs];
    Shape shapes[kMaxInputs + kMaxOutputs];
    for (int i = 0; i < inputs_; ++i) {
      types[i] = input_descs[i].type;
      shapes[i] = shape_of(input_descs[i].dims);
    }
    for (int i = 0; i < outputs_; ++i) shapes[inputs_ + i] = shape_of(output_descs[i].dims);
    const Call call = make_call(types, shapes, inputs_ + outputs_, problem);
    if (!problem) launch(call, inputs, outputs, workspace, stream, problem);
    return problem ? fail(problem) : 0;
  }

  IPluginV3* attachToContext(IPluginResourceContext*) noexcept override { return clone(); }

  const PluginFieldCollection* getFieldsToSerialize() noexcept override {
    int filled = 0;
    for (; filled < count(op_.fields); ++filled) {
      const Field& field = op_.fields[filled];
      Number& number = numbers_.values[filled];
      serialized_[filled] = field.kind == Kind::integer
                                ? PluginField(field.name, &number.integer, PluginFieldType::kINT32, 1)
                                : PluginField(field.name, &number.real, PluginFieldType::kFLOAT32, 1);
    }
    serialized_[filled++] = PluginField(kKernelsField, &kernels_, PluginFieldType::kINT32, 1);
    collection_ = {filled, serialized_};
    return &collection_;
  }

 private:
  static Type output_type(Types allowed, Type chosen) {
    for (const auto& pair : kDataTypes) {
      if (allowed == only(pair.ours)) return pair.ours;
    }
    return chosen;
  }

  Type choose(const DataType* given, int32_t count, Problem& problem) const {
    Type types[kMaxInputs];
    check_count(count, problem);
    for (int i = 0; i < inputs_ && !problem; ++i) {
      if (!to_ours(given[i], types[i])) problem.say("%s: %s has a type it can not have.", op_.name, op_.inputs[i].name);
    }
    return problem ? Type::i32 : variable_type(op_, types, problem);
  }

  Call make_call(const DataType* types, const Shape* shapes, int count, Problem& problem) const {
    return {op_, sizes(op_, shapes, count, numbers_, problem), numbers_, choose(types, inputs_, problem)};
  }

  int64_t workspace(const DynamicPluginTensorDesc* inputs, int32_t count, Problem& problem) const {
    DataType types[kMaxInputs];
    Shape shapes[kMaxInputs];
    check_count(count, problem);
    for (int i = 0; i < inputs_ && !problem; ++i) {
      types[i] = inputs[i].desc.type;
      shapes[i] = shape_of(inputs[i].max);
    }
    if (problem) return 0;
    const Call call = make_call(types, shapes, inputs_, problem);
    return problem ? 0 : workspace_bytes(call, problem);
  }

  void check_count(int32_t inputs, Problem& problem) const {
    if (inputs != inputs_) problem.say("%s: it has %d inputs, expected %d.", op_.name, inputs, inputs_);
  }

  // The dimension of an input that a letter stands for. One of every output's letters has factor 1 in an input.
  const IDimensionExpr* symbol(const DimsExprs* inputs, char letter) const {
    for (int i = 0; i < inputs_; ++i) {
      const char* rest = op_.inputs[i].shape;
      Dim dim{};
      for (int k = 0; next_dim(rest, dim); ++k) {
        if (dim.letter == letter && dim.factor == 1) return inputs[i].d[k];
      }
    }
    return nullptr;
  }

  const Op& op_;
  const int inputs_, outputs_;
  Numbers numbers_;
  int32_t kernels_ = GLM_CUDA_ABI;
  PluginField serialized_[kMaxFields + 1];
  PluginFieldCollection collection_;
};

class Creator final : public IPluginCreatorV3One {
 public:
  explicit Creator(const Op& op) : op_(op) {
    for (int i = 0; i < count(op.fields); ++i) {
      const bool integer = op.fields[i].kind == Kind::integer;
      names_[i] = {op.fields[i].name, nullptr, integer ? PluginFieldType::kINT32 : PluginFieldType::kFLOAT32, 1};
    }
    collection_ = {count(op.fields), names_};
  }

  const char* getPluginName() const noexcept override { return op_.name; }
  const char* getPluginVersion() const noexcept override { return kVersion; }
  const char* getPluginNamespace() const noexcept override { return kDomain; }
  const PluginFieldCollection* getFieldNames() noexcept override { return &collection_; }

  IPluginV3* createPlugin(const char*, const PluginFieldCollection* fields, TensorRTPhase phase) noexcept override {
    Problem problem;
    GivenField given[kMaxGiven];
    const int count = fields ? fields->nbFields : 0;
    if (count < 0 || count > kMaxGiven || (count && !fields->fields)) {
      problem.say("%s: there are %d fields, expected at most %d.", op_.name, count, kMaxGiven);
      return fail(problem), nullptr;
    }
    for (int i = 0; i < count; ++i) {
      const PluginField& field = fields->fields[i];
      given[i] = {field.name, field.data, field.type == PluginFieldType::kINT32,
                  field.type == PluginFieldType::kFLOAT32, field.length};
    }
    const Numbers numbers = read_fields(op_, given, count, problem);
    const int32_t built_for = read_version(kKernelsField, given, count);
    if (phase == TensorRTPhase::kRUNTIME && built_for != GLM_CUDA_ABI) {
      problem.say(
          "%s: the engine was built for version %d of the CUDA kernels, installed is %d; build the engine again.",
          op_.name, built_for, GLM_CUDA_ABI);
    }
    if (problem) return fail(problem), nullptr;
    return new (std::nothrow) Plugin(op_, numbers);
  }

 private:
  const Op& op_;
  PluginField names_[kMaxFields];
  PluginFieldCollection collection_;
};

}  // namespace
}  // namespace glm::trt

#define GLM_EXPORT extern "C" __attribute__((visibility("default")))

GLM_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder) { glm::trt::g_logger_finder = finder; }

GLM_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) {
  using namespace glm::trt;  // NOLINT(google-build-using-namespace)
  // TensorRT keeps them as long as the library.
  static Creator creators[] = {Creator(kOps[0]), Creator(kOps[1]), Creator(kOps[2]), Creator(kOps[3])};
  static_assert(std::size(creators) == kOpCount);
  static nvinfer1::IPluginCreatorInterface* const pointers[] = {&creators[0], &creators[1], &creators[2], &creators[3]};
  count = kOpCount;
  return pointers;
}
