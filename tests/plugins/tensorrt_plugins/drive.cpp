// Plays TensorRT's part for libglm_trt_plugins.so: makes a router and a cache write as for a network, has them
// serialized, makes them again as for a plan, and runs those. Prints what happened.
#include <cstdio>
#include <cstring>
#include <initializer_list>
#include <memory>

#include "NvInferRuntime.h"

using namespace nvinfer1;

extern "C" IPluginCreatorInterface* const* getCreators(int32_t& count);
extern "C" void setLoggerFinder(ILoggerFinder* finder);
extern "C" const char* fake_journal();

class Logger final : public ILogger, public ILoggerFinder {
 public:
  void log(Severity, const char* message) noexcept override { std::printf("error: %s\n", message); }
  ILogger* findLogger() override { return this; }
};

static IPluginCreatorV3One* creator(const char* name) {
  int32_t count = 0;
  IPluginCreatorInterface* const* all = getCreators(count);
  for (int i = 0; i < count; ++i) {
    auto* one = static_cast<IPluginCreatorV3One*>(all[i]);
    if (!std::strcmp(one->getPluginName(), name)) return one;
  }
  return nullptr;
}

template <class T>
static T* capability(IPluginV3& plugin, PluginCapabilityType kind) {
  return static_cast<T*>(plugin.getCapabilityInterface(kind));
}

static PluginTensorDesc desc(DataType type, std::initializer_list<int64_t> dims) {
  PluginTensorDesc made{};
  made.type = type;
  made.format = TensorFormat::kLINEAR;
  for (int64_t size : dims) made.dims.d[made.dims.nbDims++] = size;
  return made;
}

static void run(const char* name, const PluginFieldCollection& fields, const PluginTensorDesc* inputs,
                const PluginTensorDesc* outputs, const void* const* in, void* const* out) {
  const std::unique_ptr<IPluginV3> built(creator(name)->createPlugin("node", &fields, TensorRTPhase::kBUILD));
  auto* first = capability<IPluginV3OneRuntime>(*built, PluginCapabilityType::kRUNTIME);
  const PluginFieldCollection* plan = first->getFieldsToSerialize();
  for (int i = 0; i < plan->nbFields; ++i) std::printf("serialized: %s\n", plan->fields[i].name);
  const std::unique_ptr<IPluginV3> opened(creator(name)->createPlugin("node", plan, TensorRTPhase::kRUNTIME));
  auto* second = capability<IPluginV3OneRuntime>(*opened, PluginCapabilityType::kRUNTIME);
  const std::unique_ptr<IPluginV3> attached(second->attachToContext(nullptr));
  auto* last = capability<IPluginV3OneRuntime>(*attached, PluginCapabilityType::kRUNTIME);
  auto* build = capability<IPluginV3OneBuildV2>(*attached, PluginCapabilityType::kBUILD);
  const int code = last->enqueue(inputs, outputs, in, out, nullptr, reinterpret_cast<cudaStream_t>(5));
  std::printf("aliased: %d\nenqueue: %d\n%s", build->getAliasedInput(0), code, fake_journal());
}

static void* at(intptr_t address) { return reinterpret_cast<void*>(address); }

int main() {
  Logger logger;
  setLoggerFinder(&logger);
  const int32_t top_k = 4, n_group = 2, topk_group = 1, norm = 1;
  const float scale = 2.5f;
  const PluginField given[] = {{"top_k", &top_k, PluginFieldType::kINT32, 1},
                               {"n_group", &n_group, PluginFieldType::kINT32, 1},
                               {"topk_group", &topk_group, PluginFieldType::kINT32, 1},
                               {"norm_topk_prob", &norm, PluginFieldType::kINT32, 1},
                               {"routed_scaling_factor", &scale, PluginFieldType::kFLOAT32, 1}};
  const PluginTensorDesc router_in[] = {desc(DataType::kFLOAT, {3, 16}), desc(DataType::kFLOAT, {16})};
  const PluginTensorDesc router_out[] = {desc(DataType::kINT32, {3, 4}), desc(DataType::kFLOAT, {3, 4})};
  const void* router_from[] = {at(4096), at(8192)};
  void* router_to[] = {at(12288), at(16384)};
  run("MoERouter", {5, given}, router_in, router_out, router_from, router_to);

  const PluginTensorDesc cache_in[] = {desc(DataType::kFP8, {2, 3, 32, 16}), desc(DataType::kBF16, {2, 3, 5, 16}),
                                       desc(DataType::kINT32, {2})};
  const void* cache_from[] = {at(4096), at(8192), at(12288)};
  void* in_place[] = {at(4096)};
  void* elsewhere[] = {at(16384)};
  run("FP8CacheWrite", {0, nullptr}, cache_in, cache_in, cache_from, in_place);
  run("FP8CacheWrite", {0, nullptr}, cache_in, cache_in, cache_from, elsewhere);
  const PluginFieldCollection too_many{1 << 30, given};
  const IPluginV3* refused = creator("MoERouter")->createPlugin("node", &too_many, TensorRTPhase::kRUNTIME);
  std::printf("too many fields: %s\n", refused ? "taken" : "refused");
}
