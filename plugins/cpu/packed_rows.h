// Activation rows, quantized where the weights are FP8, and packed for the instruction set; shared by several products.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "plugins/cpu/flow.h"
#include "plugins/cpu/gemm.h"
#include "plugins/cpu/rows.h"

namespace glm {

// How a product is cut into tasks. With few activation rows a task is a stream of weights, long enough that its start,
// which waits for memory, and handing it out cost little; with many, activations are packed into tiles once per task,
// which costs little beside some hundred weight rows, and a block of them stays in the second-level cache.
constexpr size_t kFewRows = 8;
constexpr size_t kStreamBytes = 64 << 10;
constexpr size_t kRowsPerTask = 192;
constexpr size_t kMostStreams = 64;
constexpr size_t kPackedPerTask = 2048;  // activations that are packed; a microsecond or two

inline size_t weight_rows_per_task(size_t rows, size_t row_bytes, size_t activation_rows) {
  const size_t wanted = activation_rows <= kFewRows
                            ? std::max(ceil_div(kStreamBytes, row_bytes), ceil_div(rows, kMostStreams))
                            : std::min<size_t>(std::max<size_t>(ceil_div(rows, 4), 128), 512);
  return std::min(rows, round_up(wanted, 8));
}

// Calls in `count` numbers that are needed after a product: scales and biases lie apart from the weights, and to wait
// for them there costs as much as some weight rows.
GLM_INLINE void prefetch(const float* x, size_t count) {
  if (!x) return;
  for (size_t i = 0; i < count; i += 64 / sizeof(float)) __builtin_prefetch(x + i);
}

class PackedRows {
 public:
  // Room for `count` rows of `width` elements, which `set` fills. Memory is kept for the next time: an instance that
  // stays with its thread touches no fresh pages.
  void resize(const Gemm& g, Form form, size_t count, size_t width) {
    form_ = form;
    width_ = width;
    row_bytes_ = g.packed_bytes(form, width);
    if (capacity_ < row_bytes_ * count) {
      data_.reset();
      capacity_ = 0;
      data_.reset(static_cast<uint8_t*>(std::aligned_alloc(64, row_bytes_ * count)));
      if (!data_) throw std::bad_alloc();
      capacity_ = row_bytes_ * count;
    }
    scales_.assign(count, 1.0f);
    pointers_.resize(count);
    for (size_t t = 0; t < count; ++t) pointers_[t] = data_.get() + t * row_bytes_;
  }

  // Packs row t; x [I] is overwritten when it is quantized.
  void set(const Gemm& g, size_t t, float* x) {
    if (form_ == Form::bf16_e4m3) scales_[t] = g.quantize_row(x, width_);
    g.pack(form_, x, width_, data_.get() + t * row_bytes_);
  }

  // Adds a stage that packs x [T, I], of which it needs `needs`.
  Flow::Done pack(Flow& flow, const Gemm& g, Form form, Type type, const void* x, size_t count, size_t width,
                  Flow::Done needs) {
    resize(g, form, count, width);
    const auto pack_some = [=, &g](size_t begin, size_t end) {
      thread_local std::vector<float> row;
      if (row.size() < width) row.resize(width);
      for (size_t t = begin; t < end; ++t) {
        const float* values = load_f32(type, x, t * width, width, row.data());
        if (values != row.data()) std::copy(values, values + width, row.data());
        set(g, t, row.data());
      }
    };
    return split(flow, needs, count, width, pack_some, kPackedPerTask);
  }

  const void* const* pointers() const { return pointers_.data(); }
  const float* scales() const { return scales_.data(); }
  float scale(size_t t) const { return scales_[t]; }

 private:
  struct Free {
    void operator()(uint8_t* p) const { std::free(p); }
  };

  Form form_ = Form::f32_f32;
  size_t width_ = 0, row_bytes_ = 0, capacity_ = 0;
  std::vector<float> scales_;
  std::vector<const void*> pointers_;
  std::unique_ptr<uint8_t, Free> data_;
};

// y [count, rows] = the products of `rows` weight rows with packed rows x [count] of `width` elements, times the scales
// of both where the weights have some.
inline void scaled_product(const Gemm& g, Form form, const uint8_t* weights, const float* weight_scale, size_t rows,
                           const void* const* x, const float* x_scale, size_t count, size_t width, float* y) {
  prefetch(weight_scale, rows);
  g.multiply(form, weights, rows, x, count, width, y, rows);
  if (!weight_scale) return;
  for (size_t t = 0; t < count; ++t) {
    for (size_t i = 0; i < rows; ++i) y[t * rows + i] *= x_scale[t] * weight_scale[i];
  }
}

}  // namespace glm
