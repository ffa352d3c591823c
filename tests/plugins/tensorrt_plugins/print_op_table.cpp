// The table of the C++ plugins as JSON, for the test that compares it with the schemas.
#include <cstdio>
#include <initializer_list>

#include "plugins/tensorrt/op_table.h"

using namespace glm::trt;

static void print_dtypes(Types types) {
  const char* names[] = {"float32", "float16", "bfloat16", "float8_e4m3fn", "int32"};
  const char* comma = "";
  std::printf("[");
  for (Type type : {Type::f32, Type::f16, Type::bf16, Type::e4m3, Type::i32}) {
    if (!(types & only(type))) continue;
    std::printf("%s\"%s\"", comma, names[static_cast<int>(type)]);
    comma = ",";
  }
  std::printf("]");
}

template <int N>
static void print_operands(const char* what, const Operand (&operands)[N]) {
  std::printf("\"%s\": [", what);
  for (int i = 0; i < count(operands); ++i) {
    const Operand& operand = operands[i];
    std::printf("%s[\"%s\", \"%s\", ", i ? ", " : "", operand.name, operand.shape);
    print_dtypes(operand.types);
    std::printf(", %d]", operand.in_place_of);
  }
  std::printf("], ");
}

int main() {
  std::printf("{\"domain\": \"%s\", \"version\": \"%s\", \"ops\": {", kDomain, kVersion);
  for (int i = 0; i < kOpCount; ++i) {
    const Op& op = kOps[i];
    std::printf("%s\"%s\": {", i ? ", " : "", op.name);
    print_operands("inputs", op.inputs);
    print_operands("outputs", op.outputs);
    std::printf("\"fields\": [");
    for (int k = 0; k < count(op.fields); ++k) {
      const Field& field = op.fields[k];
      std::printf("%s[\"%s\", \"%s\", \"%.1s\"]", k ? ", " : "", field.name,
                  field.kind == Kind::integer ? "int" : "float", field.letter ? &field.letter : "");
    }
    std::printf("]}");
  }
  std::printf("}}\n");
}
