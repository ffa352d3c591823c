// Activation rows, quantized where the weights are FP8, and packed for the instruction set; shared by several products.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "plugins/cpu/gemm.h"
#include "plugins/cpu/rows.h"

namespace glm {

class PackedRows {
 public:
  // Packs x [T, I]; one task packs a block of rows.
  PackedRows(const Gemm& g, Form form, Type type, const void* x, size_t count, size_t width, const Parallel& parallel)
      : PackedRows(g, form, count, width) {
    split(parallel, count, width, [&](size_t begin, size_t end) {
      thread_local std::vector<float> row;
      if (row.size() < width) row.resize(width);
      for (size_t t = begin; t < end; ++t) {
        const float* values = load_f32(type, x, t * width, width, row.data());
        if (values != row.data()) std::copy(values, values + width, row.data());
        set(g, t, row.data());
      }
    });
  }

  // Room for `count` rows that `set` fills.
  PackedRows(const Gemm& g, Form form, size_t count, size_t width)
      : form_(form), width_(width), row_bytes_(g.packed_bytes(form, width)), scales_(count, 1.0f), pointers_(count) {
    data_.reset(static_cast<uint8_t*>(std::aligned_alloc(64, row_bytes_ * (count ? count : 1))));
    if (!data_) throw std::bad_alloc();
    for (size_t t = 0; t < count; ++t) pointers_[t] = data_.get() + t * row_bytes_;
  }

  // Packs row t; x [I] is overwritten when it is quantized.
  void set(const Gemm& g, size_t t, float* x) {
    if (form_ == Form::bf16_e4m3) scales_[t] = g.quantize_row(x, width_);
    g.pack(form_, x, width_, data_.get() + t * row_bytes_);
  }

  const void* const* pointers() const { return pointers_.data(); }
  float scale(size_t t) const { return scales_[t]; }
  size_t row_bytes() const { return row_bytes_; }

 private:
  struct Free {
    void operator()(uint8_t* p) const { std::free(p); }
  };

  Form form_;
  size_t width_, row_bytes_;
  std::vector<float> scales_;
  std::vector<const void*> pointers_;
  std::unique_ptr<uint8_t, Free> data_;
};

}  // namespace glm
