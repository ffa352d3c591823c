// What every CPU kernel is written against: element types, row conversion, and the loop that ONNX Runtime runs for us.
//
// Letters as everywhere in the project: T rows (tokens), I input width, O output width, D hidden, F expert width,
// E experts, K chosen, B batch, S new tokens, H query heads, J key/value heads, A head size, C cache capacity, R
// rotary/2.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

// For the pieces of a loop, and for functions that only prefetch: compilers take those for ones without effect.
#define GLM_INLINE inline __attribute__((always_inline))

namespace glm {

// The element types of ONNX that our ops take, by their ONNX numbers.
enum class Type : int32_t { f32 = 1, i32 = 6, i64 = 7, f16 = 10, bf16 = 16, e4m3 = 17 };

inline size_t size_of(Type type) {
  switch (type) {
    case Type::f32:
    case Type::i32:
      return 4;
    case Type::i64:
      return 8;
    case Type::f16:
    case Type::bf16:
      return 2;
    case Type::e4m3:
      return 1;
  }
  return 0;
}

// Runs task(0) .. task(count - 1) on ONNX Runtime's own threads; returns when all are done. No pool of our own.
class Parallel {
 public:
  using Function = void (*)(void* data, size_t index);

  virtual ~Parallel() = default;
  virtual void run(Function function, void* data, size_t count) const = 0;

  template <class Task>
  void operator()(size_t count, const Task& task) const {
    if (count == 1) {
      task(0);
    } else if (count > 1) {
      auto* data = const_cast<void*>(static_cast<const void*>(&task));
      run([](void* data, size_t index) { (*static_cast<const Task*>(data))(index); }, data, count);
    }
  }
};

// a / b, rounded up.
constexpr size_t ceil_div(size_t a, size_t b) { return (a + b - 1) / b; }
// The multiple of `unit` that is n or just above.
constexpr size_t round_up(size_t n, size_t unit) { return ceil_div(n, unit) * unit; }
// Bytes rounded up to whole cache lines.
constexpr size_t whole_lines(size_t bytes) { return round_up(bytes, 64); }

// How many tasks a loop of `items` is worth splitting into, at `per_task` items or more each.
inline size_t tasks_for(size_t items, size_t per_task, size_t most) {
  const size_t tasks = ceil_div(items, per_task);
  return tasks < most ? (tasks ? tasks : 1) : most;
}

// Which instruction set to use: the best the machine has, or what GLM_EXPORT_CPU (scalar, avx2, avx512) says. Each has
// all of those before it.
enum class Isa { scalar, avx2, avx512 };
Isa isa();

inline float bf16_to_f32(uint16_t value) {
  uint32_t bits = static_cast<uint32_t>(value) << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}

// Round to nearest even; NaN stays NaN.
inline uint16_t f32_to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  bits += 0x7fffu + ((bits >> 16) & 1u);
  return static_cast<uint16_t>(bits >> 16);
}

}  // namespace glm
