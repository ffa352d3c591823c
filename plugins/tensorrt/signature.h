// An op's row of the table read as a plugin's signature: which types, shapes and fields fit it, and what sizes they
// mean. Whatever does not fit becomes a sentence. Nothing here needs TensorRT or CUDA.
#pragma once

#include <cstdint>

#include "plugins/tensorrt/op_table.h"

namespace glm::trt {

// What is wrong, in one sentence; empty if nothing is.
struct Problem {
  char text[256] = "";
  explicit operator bool() const { return text[0] != 0; }
  void say(const char* format, ...) __attribute__((format(printf, 2, 3)));
};

struct Shape {
  const int64_t* dims;  // a negative one is not known yet
  int rank;
};

// The size of every letter; -1 where it is not known.
class Sizes {
 public:
  Sizes() {
    for (int32_t& size : of_) size = -1;
  }
  int32_t operator[](char letter) const { return of_[letter - 'A']; }
  int32_t& operator[](char letter) { return of_[letter - 'A']; }

 private:
  int32_t of_['Z' - 'A' + 1];
};

// A node's attributes, in the order of the op's fields.
struct Number {
  int32_t integer;
  float real;
};
struct Numbers {
  Number values[kMaxFields] = {};
};

// A field as TensorRT gives it: `length` values at `data`. A plan may come from anywhere, so nothing of it is trusted.
struct GivenField {
  const char* name;
  const void* data;
  bool is_integer;  // 32 bits
  bool is_real;     // 32 bits
  int32_t length;
};

// One dimension of a shape's text, which moves on to the next; false at its end.
struct Dim {
  int factor;
  char letter;
};
bool next_dim(const char*& shape, Dim& dim);

const Operand& operand(const Op& op, int position);  // inputs, then outputs

// The type that all inputs with a choice have; Type::i32 if there are none.
Type variable_type(const Op& op, const Type* inputs, Problem& problem);

// The sizes that the shapes of the first `count` operands mean, together with those that are attributes.
Sizes sizes(const Op& op, const Shape* shapes, int count, const Numbers& numbers, Problem& problem);

Numbers read_fields(const Op& op, const GivenField* given, int count, Problem& problem);

// The only integer of a name; -1 if there is none.
int32_t read_version(const char* name, const GivenField* given, int count);

}  // namespace glm::trt
