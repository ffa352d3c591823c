// The inputs of a node that make one part of a product: weight, its scales where it is FP8, and perhaps a bias.
#pragma once

#include "plugins/cpu/op.h"
#include "plugins/linear/linear.h"

namespace glm {

class LinearOperands {
 public:
  // The inputs from `first` on. Throws Error where their shapes do not go together, or the width is not the given one.
  LinearOperands(const Run& run, size_t first, bool with_scale, int64_t width = kPositive)
      : weight_(run.input(first)),
        scale_(with_scale ? run.input(first + 1) : Tensor()),
        bias_(run.input(first + (with_scale ? 2 : 1))) {
    weight_.expect({kPositive, width});
    if (scale_.present()) scale_.expect({out_size()});
    if (bias_.present()) bias_.expect({out_size()});
  }

  // How many inputs they are.
  static constexpr size_t count(bool with_scale) { return with_scale ? 3 : 2; }

  Type type() const { return weight_.type(); }
  int64_t out_size() const { return weight_.dim(0); }
  int64_t width() const { return weight_.dim(1); }

  LinearPart part(const Tensor& y) const {
    return {weight_.data(), scale_.present() ? scale_.as<const float>() : nullptr,
            bias_.present() ? bias_.as<const float>() : nullptr, static_cast<size_t>(out_size()), y.data()};
  }

 private:
  Tensor weight_, scale_, bias_;
};

}  // namespace glm
