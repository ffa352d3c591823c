// Rows of weights times rows of activations, the one product behind Linear and MoEExperts.
//
// A weight row is read in the dtype and order of the bundle, nothing is repacked. An activation row is packed once into
// the form that the instruction set multiplies with. Sums are float32.
#pragma once

#include "plugins/cpu/kernel.h"

namespace glm {

// How weights and activations meet.
enum class Form {
  f32_f32,    // float32 weights, float32 activations
  f32_bf16,   // bfloat16 weights, float32 activations (the head)
  f32_f16,    // float16 weights, float32 activations
  bf16_bf16,  // bfloat16 weights, activations that are bfloat16 numbers
  bf16_e4m3,  // E4M3 weights, activations that are E4M3 numbers
};

// The form for weights of a type and activations that came as another.
inline Form form_of(Type weight, Type activation) {
  if (weight == Type::e4m3) return Form::bf16_e4m3;
  if (weight == Type::bf16) return activation == Type::bf16 ? Form::bf16_bf16 : Form::f32_bf16;
  return weight == Type::f16 ? Form::f32_f16 : Form::f32_f32;
}

struct Gemm {
  // Bytes of a packed row of width I; a multiple of 64.
  size_t (*packed_bytes)(Form form, size_t width);

  // Packs a row x [I] into `packed`.
  void (*pack)(Form form, const float* x, size_t width, void* packed);

  // y[m * stride + n] = weight row n . activation row m, for n < rows and m < count.
  // weights: rows of `width` elements, one after the other; activations: `count` pointers to packed rows.
  void (*multiply)(Form form, const void* weights, size_t rows, const void* const* activations, size_t count,
                   size_t width, float* y, size_t stride);

  // Rounds x [I] to FP8 as a row: scale = max|x| / 448 (1 if all zero), x becomes the E4M3 number nearest x / scale.
  float (*quantize_row)(float* x, size_t width);

  // silu(gate) * up, both [F], into out.
  void (*silu_mul)(const float* gate, const float* up, size_t width, float* out);
};

extern const Gemm kGemmScalar;
extern const Gemm kGemmAvx2;
extern const Gemm kGemmAvx512;

// The forms for an instruction set.
const Gemm& gemm(Isa isa);

}  // namespace glm
