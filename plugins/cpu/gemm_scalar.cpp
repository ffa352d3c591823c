// The portable forms: plain loops over float32, which any compiler turns into correct code.
#include "plugins/cpu/gemm_inline.h"

namespace glm {
namespace {

// Sign, 4 bits of exponent (bias 7), 3 of mantissa; a product moves the bias, subnormals included. NaN is not told
// apart: no build lets one into a bundle.
float e4m3_to_f32(uint8_t byte) {
  const float magnitude = float_of(static_cast<uint32_t>(byte & 0x7f) << 20) * 0x1p120f;
  return byte & 0x80 ? -magnitude : magnitude;
}

float weight_at(Form form, const void* row, size_t i) {
  switch (form) {
    case Form::f32_f32:
      return static_cast<const float*>(row)[i];
    case Form::f32_bf16:
    case Form::bf16_bf16:
      return bf16_to_f32(static_cast<const uint16_t*>(row)[i]);
    case Form::f32_f16:
      return f16_to_f32(static_cast<const uint16_t*>(row)[i]);
    case Form::bf16_e4m3:
      return e4m3_to_f32(static_cast<const uint8_t*>(row)[i]);
  }
  return 0;
}

size_t weight_bytes(Form form) {
  if (form == Form::f32_f32) return 4;
  return form == Form::bf16_e4m3 ? 1 : 2;
}

size_t packed_bytes(Form, size_t width) { return whole_lines(width * 4); }

void pack(Form, const float* x, size_t width, void* packed) { std::memcpy(packed, x, width * 4); }

void multiply(Form form, const void* weights, size_t rows, const void* const* activations, size_t count, size_t width,
              float* y, size_t stride) {
  const size_t row_bytes = width * weight_bytes(form);
  for (size_t n = 0; n < rows; ++n) {
    const auto* row = static_cast<const uint8_t*>(weights) + n * row_bytes;
    for (size_t m = 0; m < count; ++m) {
      const auto* x = static_cast<const float*>(activations[m]);
      float sum = 0;
      for (size_t i = 0; i < width; ++i) sum += weight_at(form, row, i) * x[i];
      y[m * stride + n] = sum;
    }
  }
}

}  // namespace

const Gemm kGemmScalar = {packed_bytes, pack, multiply, quantize_row, silu_mul};

}  // namespace glm
