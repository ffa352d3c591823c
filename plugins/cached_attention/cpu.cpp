// Checks the operands of CachedAttention; attention.cpp computes.
#include <utility>

#include "plugins/cached_attention/attention.h"
#include "plugins/cpu/op.h"

namespace glm {
namespace {

class CachedAttentionKernel : public Kernel {
 public:
  explicit CachedAttentionKernel(const Node& node)
      : rotary_dim_(node.integer("rotary_dim")), scale_(node.real("scale")), isa_(isa()) {
    if (rotary_dim_ < 0 || rotary_dim_ % 2 != 0) {
      throw Error("rotary_dim is " + std::to_string(rotary_dim_) + ", expected an even number.");
    }
  }

  void compute(Run& run) const override {
    const Tensor q = run.input(0), k = run.input(1), v = run.input(2), cos = run.input(3), sin = run.input(4);
    const Tensor k_cache = run.input(5), v_cache = run.input(6), write_index = run.input(7), length = run.input(8);
    q.expect({kAny, kAny, kPositive, kPositive});
    k_cache.expect({q.dim(0), kPositive, kPositive, q.dim(3)});
    const int64_t B = q.dim(0), S = q.dim(1), H = q.dim(2), A = q.dim(3), J = k_cache.dim(1), C = k_cache.dim(2);
    if (H % J != 0) {
      throw Error("there are " + std::to_string(H) + " query heads: they must be a multiple of the " +
                  std::to_string(J) + " key/value heads.");
    }
    if (rotary_dim_ > A) {
      throw Error("rotary_dim is " + std::to_string(rotary_dim_) + ", larger than the head size " + std::to_string(A) +
                  ".");
    }
    k.expect({B, S, J, A});
    v.expect({B, S, J, A});
    cos.expect({B, S, rotary_dim_ / 2});
    sin.expect({B, S, rotary_dim_ / 2});
    v_cache.expect(k_cache.shape());
    write_index.expect({B});
    length.expect({B});
    for (int64_t b = 0; b < B; b++) {
      const int64_t start = write_index.as<const int64_t>()[b];
      if (start < 0 || start > C - S) {
        throw Error("row " + std::to_string(b) + " writes " + std::to_string(S) + " tokens at " +
                    std::to_string(start) + ", but the cache has room for " + std::to_string(C) + ".");
      }
    }

    const Tensor out = run.output(0, q.shape());
    const Tensor k_cache_out = run.output(1, k_cache.shape()), v_cache_out = run.output(2, v_cache.shape());
    const Tensor attentions = run.output(3, {B, H, S, C});
    const auto size = [](int64_t n) { return static_cast<size_t>(n); };
    if (B * S == 0) {  // nothing is added to the caches
      for (const auto& [from, to] : {std::pair(k_cache, k_cache_out), std::pair(v_cache, v_cache_out)}) {
        const size_t bytes = size(from.size()) * size_of(from.type());
        if (from.data() != to.data() && bytes > 0) std::memcpy(to.data(), from.data(), bytes);
      }
      return;
    }
    const CachedAttention attention{size(B),
                                    size(S),
                                    size(H),
                                    size(J),
                                    size(C),
                                    size(A),
                                    size(rotary_dim_ / 2),
                                    q.type(),
                                    k_cache.type(),
                                    scale_,
                                    q.data(),
                                    k.data(),
                                    v.data(),
                                    cos.as<const float>(),
                                    sin.as<const float>(),
                                    k_cache.data(),
                                    v_cache.data(),
                                    write_index.as<const int64_t>(),
                                    length.as<const int64_t>(),
                                    out.data(),
                                    k_cache_out.data(),
                                    v_cache_out.data(),
                                    attentions.present() ? attentions.as<float>() : nullptr};
    attention.run(isa_, run.parallel(), run.scratch(attention.scratch_bytes(isa_)));
  }

 private:
  int64_t rotary_dim_;
  float scale_;
  Isa isa_;
};

const Register<CachedAttentionKernel> kCachedAttention{"CachedAttention",
                                                       {{"q", kCompute},
                                                        {"k", kCompute, "q"},
                                                        {"v", kCompute, "q"},
                                                        {"cos", kF32},
                                                        {"sin", kF32},
                                                        {"k_cache", kCompute},
                                                        {"v_cache", kCompute, "k_cache"},
                                                        {"write_index", kI64},
                                                        {"length", kI64}},
                                                       {{"out", kCompute, "q"},
                                                        {"k_cache_out", kCompute, "k_cache"},
                                                        {"v_cache_out", kCompute, "k_cache"},
                                                        {"attentions", kF32, nullptr, true}}};

}  // namespace
}  // namespace glm
