// All of a MoE layer's feed-forward part in one node: the router's product, the choice of experts, the experts with the
// shared one beside them, their sum, that with the residual stream, and the norm that follows. Every value is rounded
// where the ops it stands for round it.
#include "plugins/linear/linear.h"
#include "plugins/moe_experts/experts.h"
#include "plugins/moe_router/attributes.h"
#include "plugins/rms_norm/add_rms_norm.h"

namespace glm {
namespace {

// MoEBlock (with_scale false) and FP8MoEBlock.
template <bool with_scale>
class MoEBlockKernel : public Kernel {
 public:
  explicit MoEBlockKernel(const Node& node) : attributes_(node), epsilon_(node.real("epsilon")), gemm_(gemm(isa())) {}

  void compute(Run& run) const override {
    const Tensor x = run.input(0), router = run.input(1), bias = run.input(2);
    size_t next = 3;
    const auto weight = [&](Shape dims) {
      const Tensor w = run.input(next++);
      w.expect(dims);
      return w;
    };
    const auto scale = [&](Shape dims) -> const float* {
      return with_scale ? weight(dims).template as<const float>() : nullptr;
    };
    router.expect({kPositive, kPositive});
    const int64_t E = router.dim(0), D = router.dim(1), K = attributes_.top_k();
    x.expect_rows_of(D);
    bias.expect({E});
    const Tensor gate_up = weight({E, kPositive, D});
    const int64_t F = gate_up.dim(1) / 2;
    gate_up.expect({E, 2 * F, D});
    const float* gate_up_scale = scale({E, 2 * F});
    const Tensor down = weight({E, D, F});
    const float* down_scale = scale({E, D});
    const Tensor shared_gate = weight({kPositive, D});
    const int64_t shared_F = shared_gate.dim(0);
    const float* shared_gate_scale = scale({shared_F});
    const Tensor shared_up = weight({shared_F, D});
    const float* shared_up_scale = scale({shared_F});
    const Tensor shared_down = weight({D, shared_F});
    const float* shared_down_scale = scale({D});
    const Tensor residual = run.input(next), norm = run.input(next + 1);
    residual.expect(x.shape());
    norm.expect({D});
    const AddRmsNorm add_norm{residual, norm, run.output(0, x.shape()), run.output(1, x.shape()), epsilon_};
    const int64_t T = x.rows();
    if (T == 0) return;

    const auto size = [](int64_t n) { return static_cast<size_t>(n); };
    const size_t row_bytes = size(D) * size_of(x.type()), update_bytes = whole_lines(size(T) * row_bytes),
                 logits_bytes = whole_lines(size(T * E) * sizeof(float)),
                 choice_bytes = whole_lines(size(T * K) * sizeof(float));
    auto* update = static_cast<uint8_t*>(run.scratch(update_bytes + logits_bytes + 2 * choice_bytes));
    auto* logits = reinterpret_cast<float*>(update + update_bytes);
    auto* weights = reinterpret_cast<float*>(update + update_bytes + logits_bytes);
    auto* ids = reinterpret_cast<int32_t*>(update + update_bytes + logits_bytes + choice_bytes);
    LinearPart product;
    thread_local PackedRows packed;
    PackedRows& rows = packed;  // this thread's, for the tasks too
    const auto choose = [&](Flow& flow, size_t first, size_t count) {
      product = {router.data(), nullptr, nullptr, size(E), logits + first * size(E)};
      const uint8_t* hidden = x.as<const uint8_t>() + first * row_bytes;
      const Flow::Done scored =
          add_linear(flow, {x.type(), hidden, Type::f32, Type::f32, count, size(D), &product, 1}, gemm_, rows, 0);
      return add_route(
          flow,
          attributes_.arguments(logits + first * size(E), bias.as<const float>(), static_cast<int64_t>(count), E,
                                ids + first * size(K), weights + first * size(K)),
          scored);
    };
    const auto finish = [&](Flow& flow, size_t first, size_t count, Flow::Done summed) {
      add_norm.add(flow, update, first, count, summed);
    };
    const SharedExpert shared = {size(shared_F),  shared_gate.data(), shared_gate_scale, shared_up.data(),
                                 shared_up_scale, shared_down.data(), shared_down_scale};
    work().experts += experts({x.type(), x.data(), ids, weights, gate_up.type(), gate_up.data(), gate_up_scale,
                               down.data(), down_scale, size(T), size(K), size(E), size(D), size(F), update, &shared},
                              gemm_, run.parallel(), {choose, finish});
  }

 private:
  RouterAttributes attributes_;
  float epsilon_;
  const Gemm& gemm_;
};

const Register<MoEBlockKernel<false>> kMoEBlock{"MoEBlock",
                                                {{"x", kCompute},
                                                 {"router_weight", kF32},
                                                 {"correction_bias", kF32},
                                                 {"gate_up", kCompute, "x"},
                                                 {"down", kCompute, "x"},
                                                 {"shared_gate", kCompute, "x"},
                                                 {"shared_up", kCompute, "x"},
                                                 {"shared_down", kCompute, "x"},
                                                 {"residual", kCompute, "x"},
                                                 {"norm_weight", kF32}},
                                                {{"sum", kCompute, "x"}, {"y", kCompute, "x"}}};

const Register<MoEBlockKernel<true>> kFp8MoEBlock{"FP8MoEBlock",
                                                  {{"x", kCompute},
                                                   {"router_weight", kF32},
                                                   {"correction_bias", kF32},
                                                   {"gate_up", kE4m3},
                                                   {"gate_up_scale", kF32},
                                                   {"down", kE4m3},
                                                   {"down_scale", kF32},
                                                   {"shared_gate", kE4m3},
                                                   {"shared_gate_scale", kF32},
                                                   {"shared_up", kE4m3},
                                                   {"shared_up_scale", kF32},
                                                   {"shared_down", kE4m3},
                                                   {"shared_down_scale", kF32},
                                                   {"residual", kCompute, "x"},
                                                   {"norm_weight", kF32}},
                                                  {{"sum", kCompute, "x"}, {"y", kCompute, "x"}}};

}  // namespace
}  // namespace glm
