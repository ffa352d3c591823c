// How an op's CPU kernel meets ONNX Runtime. A `plugins/<op>/cpu.cpp` describes its operands, computes, and throws
// Error with a sentence where something is wrong; the rest is done here:
//
//   class Scale : public Kernel {
//    public:
//     explicit Scale(const Node& node) : factor_(node.real("factor")), isa_(isa()) {}
//     void compute(Run& run) const override {
//       const Tensor x = run.input(0);
//       const Tensor bias = run.input(1);            // optional
//       x.expect({kAny, kPositive});
//       if (bias.present()) bias.expect({x.dim(1)});
//       const Tensor y = run.output(0, x.shape());
//       ...
//     }
//   };
//   const Register<Scale> kScale{"Scale", {{"x", kCompute}, {"bias", kF32, nullptr, true}}, {{"y", kCompute, "x"}}};
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "plugins/cpu/kernel.h"
#include "plugins/cpu/ort_abi.h"

namespace glm {

// What a user can act on: a sentence. It reaches them as an OrtStatus, with the op's name in front.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// A set of element types.
using Types = uint32_t;
constexpr Types only(Type type) { return Types{1} << static_cast<int>(type); }
constexpr Types kF32 = only(Type::f32);
constexpr Types kI32 = only(Type::i32);
constexpr Types kI64 = only(Type::i64);
constexpr Types kE4m3 = only(Type::e4m3);
constexpr Types kCompute = only(Type::f32) | only(Type::bf16) | only(Type::f16);

// An input or output. ONNX Runtime wants every operand's type fixed, so an op is registered once per combination of the
// types of its inputs; `like` names an input whose type this one has, which saves combinations. An output of several
// types needs it.
struct Operand {
  const char* name;
  Types types;
  const char* like = nullptr;
  bool optional = false;
};

// Dimensions, of a tensor or in braces. It refers to them: they must outlive it, which braces do as an argument.
class Shape {
 public:
  Shape(const int64_t* dims, size_t rank) : dims_(dims), rank_(rank) {}
  Shape(std::initializer_list<int64_t> dims) : rank_(dims.size()) { dims_ = dims.begin(); }

  size_t rank() const { return rank_; }
  const int64_t* begin() const { return dims_; }
  const int64_t* end() const { return dims_ + rank_; }

 private:
  const int64_t* dims_;
  size_t rank_;
};

// Sizes for Tensor::expect. Only the number of tokens may be zero: kernels need not think about empty sums.
constexpr int64_t kAny = -1;
constexpr int64_t kPositive = -2;

// An input or output while a kernel runs. The data is ONNX Runtime's.
class Tensor {
 public:
  Tensor() = default;
  Tensor(const char* name, Type type, void* data, const int64_t* dims, size_t rank)
      : name_(name), type_(type), data_(data), dims_(dims), rank_(rank) {}

  // False for an optional input that the node leaves out, or an optional output that nobody asked for.
  bool present() const { return name_ != nullptr; }

  Type type() const { return type_; }
  void* data() const { return data_; }
  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }

  size_t rank() const { return rank_; }
  // Counts from the end where it is negative. Throws Error if there is no such dimension.
  int64_t dim(int index) const;
  // The product of all dimensions, or of all but the last: the rows of [..., D].
  int64_t size() const;
  int64_t rows() const;
  Shape shape() const { return {dims_, rank_}; }

  // Throws Error unless the shape is this one, which may have kAny and kPositive in it.
  void expect(Shape shape) const;
  // Throws Error unless the last dimension is D, whatever those before it.
  void expect_rows_of(int64_t D) const;

 private:
  const char* name_ = nullptr;
  Type type_ = Type::f32;
  void* data_ = nullptr;
  const int64_t* dims_ = nullptr;
  size_t rank_ = 0;
};

// A node of the graph, when its kernel is made.
class Node {
 public:
  Node(const ort::OrtApi* api, const ort::OrtKernelInfo* info) : api_(api), info_(info) {}
  // An attribute; throws Error if the node has none of that name and kind.
  int64_t integer(const char* name) const;
  float real(const char* name) const;

 private:
  const ort::OrtApi* api_;
  const ort::OrtKernelInfo* info_;
};

struct Op;

// What is known of a node before it runs: how many operands it has, and the inputs that never change, which are the
// weights. To ask ONNX Runtime for them at every run would cost as much as a small kernel: after gigabytes of weights
// none of its records is in the caches any more, and each is a wait for memory. Here they lie one behind the other.
class Known {
 public:
  Known(const ort::OrtApi* api, const ort::OrtKernelInfo* info, const Op& op);
  Known(const Known&) = delete;
  Known& operator=(const Known&) = delete;

  size_t inputs = 0, outputs = 0;
  std::vector<Tensor> constants;  // by input; not present() where it is no constant

 private:
  std::vector<int64_t> dims_;  // of the constants
};

// One run of a node: its inputs, its outputs and the threads.
class Run : private Parallel {
 public:
  Run(const ort::OrtApi* api, ort::OrtKernelContext* context, const Op& op, const Known& known)
      : api_(api), context_(context), op_(op), known_(known) {}

  Tensor input(size_t index) const;
  // Allocates the output, or takes what the caller bound to it; not present() if it is optional and not asked for.
  // Where the caller bound input and output to one buffer, both have the same data(): nothing is to be copied then.
  Tensor output(size_t index, Shape shape);

  // Runs tasks on ONNX Runtime's threads. What a task throws is thrown again here.
  const Parallel& parallel() const { return *this; }

  // Memory for intermediate results, 64-byte aligned and not cleared; there is one piece, valid until compute returns.
  // It stays with the calling thread, so that a step touches no fresh pages.
  void* scratch(size_t bytes) const;

 private:
  void run(Function function, void* data, size_t count) const override;

  const ort::OrtApi* api_;
  ort::OrtKernelContext* context_;
  const Op& op_;
  const Known& known_;
};

// A node's kernel. It is made with the session, the place to read attributes and isa(); compute may run on several
// threads at a time.
class Kernel {
 public:
  virtual ~Kernel() = default;
  virtual void compute(Run& run) const = 0;
};

// What all kernels have done since the library was loaded; a benchmark takes the difference between two moments.
struct Work {
  std::atomic<uint64_t> nanoseconds{0};  // in kernels, on the thread that ONNX Runtime calls them on
  std::atomic<uint64_t> experts{0};      // whose weights a run needed: each once per run, however many tokens chose it
};
Work& work();

// The name that GLM_EXPORT_CPU knows an instruction set by. isa() itself reads that variable at every call and throws
// Error where it is wrong: a kernel asks once, when it is made, so that the answer is that of its session.
const char* name_of(Isa isa);

// An op with a kernel.
struct Op {
  const char* name;
  std::vector<Operand> inputs;
  std::vector<Operand> outputs;
  std::unique_ptr<Kernel> (*make)(const Node& node);
};

// All of them.
std::vector<Op>& ops();

// Puts an op into the table when the library is loaded, so that adding one means adding its file.
template <class K>
struct Register {
  Register(const char* name, std::vector<Operand> inputs, std::vector<Operand> outputs) {
    ops().push_back(Op{name, std::move(inputs), std::move(outputs),
                       [](const Node& node) -> std::unique_ptr<Kernel> { return std::make_unique<K>(node); }});
  }
};

}  // namespace glm
