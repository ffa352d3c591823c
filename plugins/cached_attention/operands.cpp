#include "plugins/cached_attention/operands.h"

#include <utility>

namespace glm {
namespace {

size_t size(int64_t n) { return static_cast<size_t>(n); }

}  // namespace

AttentionAttributes::AttentionAttributes(const Node& node)
    : rotary_dim(node.integer("rotary_dim")), scale(node.real("scale")) {
  if (rotary_dim < 0 || rotary_dim % 2 != 0) {
    throw Error("rotary_dim is " + std::to_string(rotary_dim) + ", expected an even number.");
  }
}

std::vector<Operand> AttentionOperands::inputs() {
  return {{"q", kCompute},
          {"k", kCompute, "q"},
          {"v", kCompute, "q"},
          {"cos", kF32},
          {"sin", kF32},
          {"k_cache", kCompute},
          {"v_cache", kCompute, "k_cache"},
          {"write_index", kI64},
          {"length", kI64}};
}

AttentionOperands::AttentionOperands(const Run& run, int64_t rotary_dim)
    : q(run.input(0)),
      k(run.input(1)),
      v(run.input(2)),
      cos(run.input(3)),
      sin(run.input(4)),
      k_cache(run.input(5)),
      v_cache(run.input(6)),
      write_index(run.input(7)),
      length(run.input(8)) {
  q.expect({kAny, kAny, kPositive, kPositive});
  k_cache.expect({B(), kPositive, kPositive, A()});
  if (H() % J() != 0) {
    throw Error("there are " + std::to_string(H()) + " query heads: they must be a multiple of the " +
                std::to_string(J()) + " key/value heads.");
  }
  if (rotary_dim > A()) {
    throw Error("rotary_dim is " + std::to_string(rotary_dim) + ", larger than the head size " + std::to_string(A()) +
                ".");
  }
  k.expect({B(), S(), J(), A()});
  v.expect({B(), S(), J(), A()});
  cos.expect({B(), S(), rotary_dim / 2});
  sin.expect({B(), S(), rotary_dim / 2});
  v_cache.expect(k_cache.shape());
  write_index.expect({B()});
  length.expect({B()});
  for (int64_t b = 0; b < B(); b++) {
    const int64_t start = write_index.as<const int64_t>()[b];
    if (start < 0 || start > C() - S()) {
      throw Error("row " + std::to_string(b) + " writes " + std::to_string(S()) + " tokens at " +
                  std::to_string(start) + ", but the cache has room for " + std::to_string(C()) + ".");
    }
  }
}

CachedAttention AttentionOperands::attention(float scale, void* out, const Tensor& k_cache_out,
                                             const Tensor& v_cache_out, float* attentions) const {
  return {size(B()),
          size(S()),
          size(H()),
          size(J()),
          size(C()),
          size(A()),
          size(cos.dim(2)),
          q.type(),
          k_cache.type(),
          scale,
          q.data(),
          k.data(),
          v.data(),
          cos.as<const float>(),
          sin.as<const float>(),
          k_cache.data(),
          v_cache.data(),
          write_index.as<const int64_t>(),
          length.as<const int64_t>(),
          out,
          k_cache_out.data(),
          v_cache_out.data(),
          attentions};
}

void AttentionOperands::copy_caches(const Tensor& k_cache_out, const Tensor& v_cache_out) const {
  for (const auto& [from, to] : {std::pair(k_cache, k_cache_out), std::pair(v_cache, v_cache_out)}) {
    const size_t bytes = size(from.size()) * size_of(from.type());
    if (from.data() != to.data() && bytes > 0) std::memcpy(to.data(), from.data(), bytes);
  }
}

}  // namespace glm
