#include "plugins/tensorrt/signature.h"

#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstring>

namespace glm::trt {
namespace {

const char* const kTypeNames[] = {"float32", "float16", "bfloat16", "float8_e4m3fn", "int32"};

// A shape as text, for sentences.
struct ShapeText {
  char text[96] = "[";
  explicit ShapeText(const Shape& shape) {
    for (int i = 0; i < shape.rank; ++i) {
      const size_t used = std::strlen(text);
      std::snprintf(text + used, sizeof text - used, i ? ", %lld" : "%lld", static_cast<long long>(shape.dims[i]));
    }
    const size_t used = std::strlen(text);
    std::snprintf(text + used, sizeof text - used, "]");
  }
};

const GivenField* find(const char* name, const GivenField* given, int count) {
  for (int i = 0; i < count; ++i) {
    if (given[i].name && !std::strcmp(given[i].name, name)) return &given[i];
  }
  return nullptr;
}

// Whether a size fits what is known of its letter; it becomes known where it was not.
bool fits(const Dim& dim, int64_t size, Sizes& sizes) {
  if (size % dim.factor || size / dim.factor > INT32_MAX) return false;
  const int32_t value = static_cast<int32_t>(size / dim.factor);
  if (sizes[dim.letter] < 0) sizes[dim.letter] = value;
  return sizes[dim.letter] == value;
}

}  // namespace

void Problem::say(const char* format, ...) {
  if (*this) return;  // the first one is the cause
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
}

bool next_dim(const char*& shape, Dim& dim) {
  if (*shape == ',') ++shape;
  if (!*shape) return false;
  dim.factor = 1;
  if (*shape >= '0' && *shape <= '9') dim.factor = *shape++ - '0';
  dim.letter = *shape++;
  return true;
}

const Operand& operand(const Op& op, int position) {
  const int inputs = count(op.inputs);
  return position < inputs ? op.inputs[position] : op.outputs[position - inputs];
}

Type variable_type(const Op& op, const Type* inputs, Problem& problem) {
  Type chosen = Type::i32;
  for (int i = 0; i < count(op.inputs); ++i) {
    const Operand& input = op.inputs[i];
    const char* name = kTypeNames[static_cast<int>(inputs[i])];
    if (!(input.types & only(inputs[i]))) {
      problem.say("%s: %s is %s, which it can not be.", op.name, input.name, name);
    } else if (is_choice(input.types)) {
      if (chosen == Type::i32) chosen = inputs[i];
      if (chosen != inputs[i]) {
        problem.say("%s: %s is %s, expected %s as the inputs before it.", op.name, input.name, name,
                    kTypeNames[static_cast<int>(chosen)]);
      }
    }
  }
  return chosen;
}

Sizes sizes(const Op& op, const Shape* shapes, int count, const Numbers& numbers, Problem& problem) {
  Sizes found;
  for (int i = 0; i < trt::count(op.fields); ++i) {
    if (op.fields[i].letter) found[op.fields[i].letter] = numbers.values[i].integer;
  }
  for (int i = 0; i < count; ++i) {
    const Operand& tensor = operand(op, i);
    const char* rest = tensor.shape;
    Dim dim{};
    int rank = 0;
    bool right = true;
    while (next_dim(rest, dim)) {
      if (rank < shapes[i].rank && shapes[i].dims[rank] >= 0) right &= fits(dim, shapes[i].dims[rank], found);
      ++rank;
    }
    if (!right || rank != shapes[i].rank) {
      problem.say("%s: %s has shape %s, expected [%s] as the operands before it.", op.name, tensor.name,
                  ShapeText(shapes[i]).text, tensor.shape);
    }
  }
  return found;
}

Numbers read_fields(const Op& op, const GivenField* given, int count, Problem& problem) {
  Numbers numbers;
  for (int i = 0; i < trt::count(op.fields); ++i) {
    const Field& field = op.fields[i];
    Number& number = numbers.values[i];
    const GivenField* seen = find(field.name, given, count);
    if (!seen) {
      problem.say("%s: the field %s is missing.", op.name, field.name);
    } else if (seen->length != 1 || !seen->data || !(field.kind == Kind::integer ? seen->is_integer : seen->is_real)) {
      problem.say("%s: the field %s is not one %s.", op.name, field.name,
                  field.kind == Kind::integer ? "32-bit integer" : "32-bit float");
    } else if (field.kind == Kind::integer) {
      std::memcpy(&number.integer, seen->data, sizeof number.integer);
      if (number.integer < 0)
        problem.say("%s: the field %s is %d, expected 0 or more.", op.name, field.name, number.integer);
    } else {
      std::memcpy(&number.real, seen->data, sizeof number.real);
      if (!std::isfinite(number.real)) problem.say("%s: the field %s is not finite.", op.name, field.name);
    }
  }
  return numbers;
}

int32_t read_version(const char* name, const GivenField* given, int count) {
  const GivenField* seen = find(name, given, count);
  int32_t version = -1;
  if (seen && seen->length == 1 && seen->data && seen->is_integer) std::memcpy(&version, seen->data, sizeof version);
  return version;
}

}  // namespace glm::trt
