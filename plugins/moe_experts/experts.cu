// The launchers of MoEExperts and FP8MoEExperts: arguments checked, a plan made, its kernels put on the stream.
#include "plugins/cuda/check.h"
#include "plugins/moe_experts/combine.cuh"
#include "plugins/moe_experts/decode.cuh"
#include "plugins/moe_experts/group.cuh"
#include "plugins/moe_experts/mma.cuh"
#include "plugins/moe_experts/plan.h"
#include "plugins/moe_experts/wgmma.cuh"

namespace glm {
namespace {

int check_sizes(const ExpertSizes& s) {
  Check check;
  const bool known = s.hidden_type == GLM_CUDA_F32 || s.hidden_type == GLM_CUDA_F16 || s.hidden_type == GLM_CUDA_BF16;
  const bool same = s.weight_type == s.hidden_type && s.hidden_type != GLM_CUDA_F32;
  check.that(known, Argument::hidden_type, Fault::unsupported);
  check.that(same || s.weight_type == GLM_CUDA_E4M3, Argument::weight_type, Fault::unsupported);
  check.range(Argument::D, s.D, 16, 65536);
  check.multiple(Argument::D, s.D, 16);
  check.range(Argument::F, s.F, 16, 65536);
  check.multiple(Argument::F, s.F, 16);
  check.range(Argument::E, s.E, 1, 512);
  check.range(Argument::K, s.K, 1, std::min<int64_t>(s.E, 32));
  check.range(Argument::T, s.T, 0, 1 << 20);
  return check.code();
}

// Call visit with a value of the type, which check_sizes() has let pass.
template <class Visit>
int with_hidden_type(const ExpertSizes& s, Visit visit) {
  if (s.hidden_type == GLM_CUDA_BF16) return visit(bf16{});
  if (s.hidden_type == GLM_CUDA_F16) return visit(f16{});
  return visit(float{});
}
template <class Visit>
int with_weight_type(const ExpertSizes& s, Visit visit) {
  if (s.weight_type == GLM_CUDA_BF16) return visit(bf16{});
  if (s.weight_type == GLM_CUDA_F16) return visit(f16{});
  return visit(e4m3{});
}

dim3 blocks(int64_t count) { return dim3(static_cast<unsigned>(count)); }

template <bool gate_up>
int launch_product(const ExpertSizes& s, const ExpertPlan& plan, const Product& p, void* stream) {
  const ProductPlan& product = gate_up ? plan.gate_up : plan.down;
  const auto shape = [&](unsigned threads) {
    return Launch{blocks(product.blocks), threads, static_cast<size_t>(product.shared_bytes), stream};
  };
  return with_weight_type(s, [&](auto element) {
    using T = decltype(element);
    if (plan.path == GLM_CUDA_PATH_DECODE) {
      return launch(decode_kernel<T, gate_up>, shape(DecodeShape::kWarps * 32), p, product.decode);
    }
    if (plan.path == GLM_CUDA_PATH_WGMMA) {
      return launch(wgmma_kernel<T, gate_up>, shape(WgmmaShape::kThreads), p);
    }
    return launch(mma_kernel<T, gate_up>, shape(MmaShape::kThreads), p);
  });
}

// In `gate_up` and `down` everything is filled in that the products have in common with the arguments.
struct Call {
  ExpertSizes sizes;
  ExpertPlan plan;
  GroupArguments group;
  QuantizeArguments quantize_x, quantize_h;
  Product gate_up, down;
  CombineArguments combine;
  void* stream;
};

int launch_all(const Call& c) {
  constexpr size_t kQuantizeShared = kQuantizeThreads / 32 * sizeof(float);
  const ExpertSizes& s = c.sizes;
  const bool quantized = s.quantized();
  const auto rows_of_four = [](int64_t rows) { return ceil_div(rows, kQuantizeRows); };
  return with_hidden_type(s, [&](auto element) {
    using X = decltype(element);
    const Launch group{blocks(1 + (quantized ? rows_of_four(s.T) : 0)), kQuantizeThreads,
                       static_cast<size_t>(group_shared_bytes(s.E)), c.stream};
    if (const int code = launch(group_kernel<X>, group, c.group, c.quantize_x)) return code;
    if (const int code = launch_product<true>(s, c.plan, c.gate_up, c.stream)) return code;
    if (quantized) {
      const Launch quantize{blocks(rows_of_four(s.assignments())), kQuantizeThreads, kQuantizeShared, c.stream};
      if (const int code = launch(quantize_kernel<X>, quantize, c.quantize_h)) return code;
    }
    if (const int code = launch_product<false>(s, c.plan, c.down, c.stream)) return code;
    const Launch combine{blocks(s.T * ceil_div(s.D, kCombineColumns)), kCombineThreads, 0, c.stream};
    return launch(combine_kernel<X>, combine, c.combine);
  });
}

}  // namespace
}  // namespace glm

extern "C" int64_t glm_cuda_moe_experts_workspace(int32_t T, int32_t D, int32_t F, int32_t E, int32_t K,
                                                  int32_t hidden_type, int32_t weight_type) {
  const glm::ExpertSizes sizes{T, D, F, E, K, hidden_type, weight_type};
  if (const int code = glm::check_sizes(sizes)) return -code;
  return glm::ExpertWorkspace(sizes).bytes;
}

extern "C" int32_t glm_cuda_moe_experts(const void* hidden, const int32_t* expert_ids, const float* expert_weights,
                                        const void* gate_up, const float* gate_up_scale, const void* down,
                                        const float* down_scale, void* out, void* workspace, int64_t workspace_bytes,
                                        int32_t T, int32_t D, int32_t F, int32_t E, int32_t K, int32_t hidden_type,
                                        int32_t weight_type, int32_t path, void* stream) {
  using glm::Argument;
  using glm::Fault;
  const glm::ExpertSizes s{T, D, F, E, K, hidden_type, weight_type};
  if (const int code = glm::check_sizes(s)) return code;
  if (T == 0) return 0;
  const glm::ExpertWorkspace at(s);
  const bool quantized = s.quantized();
  glm::Check check;
  check.pointer(Argument::hidden, hidden, 16);
  check.pointer(Argument::expert_ids, expert_ids, 4);
  check.pointer(Argument::expert_weights, expert_weights, 4);
  check.pointer(Argument::gate_up, gate_up, 16);
  check.pointer(Argument::down, down, 16);
  if (quantized) {
    check.pointer(Argument::gate_up_scale, gate_up_scale, 4);
    check.pointer(Argument::down_scale, down_scale, 4);
  } else {
    check.that(gate_up_scale == nullptr, Argument::gate_up_scale, Fault::not_null);
    check.that(down_scale == nullptr, Argument::down_scale, Fault::not_null);
  }
  check.pointer(Argument::out, out, 16);
  check.pointer(Argument::workspace, workspace, 256);
  check.that(workspace_bytes >= at.bytes, Argument::workspace_bytes, Fault::too_small);
  check.range(Argument::path, path, GLM_CUDA_PATH_AUTO, GLM_CUDA_PATH_WGMMA);
  if (check.code()) return check.code();
  glm::Device device;
  if (const int code = glm::current_device(device)) return code;
  glm::ExpertPlan plan{};
  check.that(glm::plan_experts(s, device, path, plan), path ? Argument::path : Argument::device, Fault::unsupported);
  if (check.code()) return check.code();

  auto* base = static_cast<unsigned char*>(workspace);
  const auto floats = [&](int64_t offset) { return reinterpret_cast<float*>(base + offset); };
  auto* order = reinterpret_cast<int32_t*>(base + at.order);
  auto* runs = reinterpret_cast<glm::Run*>(base + at.runs);
  auto* run_count = reinterpret_cast<int32_t*>(base + at.run_count);
  auto* x = reinterpret_cast<glm::e4m3*>(base + at.x);
  auto* h = reinterpret_cast<glm::e4m3*>(base + at.h_quantized);
  const int A = static_cast<int>(s.assignments()), width = static_cast<int>(glm::bytes_of(weight_type));

  glm::Product gate_up_product{};
  gate_up_product.rows = static_cast<const unsigned char*>(quantized ? x : hidden);
  gate_up_product.row_scale = quantized ? floats(at.x_scale) : nullptr;
  gate_up_product.weight = static_cast<const unsigned char*>(gate_up);
  gate_up_product.weight_scale = gate_up_scale;
  gate_up_product.out = base + at.h;
  gate_up_product.order = order;
  gate_up_product.runs = runs;
  gate_up_product.run_count = run_count;
  gate_up_product.row_bytes = D * width;
  gate_up_product.columns = F;
  gate_up_product.K = K;
  gate_up_product.tiles = static_cast<int>(plan.gate_up.tiles);
  gate_up_product.out_type = hidden_type;

  glm::Product down_product = gate_up_product;
  down_product.rows = base + (quantized ? at.h_quantized : at.h);
  down_product.row_scale = quantized ? floats(at.h_scale) : nullptr;
  down_product.weight = static_cast<const unsigned char*>(down);
  down_product.weight_scale = down_scale;
  down_product.out = base + at.y;
  down_product.row_bytes = F * width;
  down_product.columns = D;
  down_product.tiles = static_cast<int>(plan.down.tiles);

  return glm::launch_all({s,
                          plan,
                          {expert_ids, order, runs, run_count, A, E, plan.run_tokens},
                          {hidden, x, floats(at.x_scale), T, D},
                          {base + at.h, h, floats(at.h_scale), A, F},
                          gate_up_product,
                          down_product,
                          {floats(at.y), expert_ids, expert_weights, out, D, K, E},
                          stream});
}
