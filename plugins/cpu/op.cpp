#include "plugins/cpu/op.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <exception>
#include <new>

namespace glm {
namespace {

std::string text(const int64_t* dims, size_t rank) {
  std::string result = "[";
  for (size_t i = 0; i < rank; ++i) {
    if (i) result += ", ";
    result += dims[i] == kAny ? "any" : dims[i] == kPositive ? "1 or more" : std::to_string(dims[i]);
  }
  return result + "]";
}

// Turns a status into an exception, and releases it.
void check(const ort::OrtApi* api, ort::OrtStatus* status) {
  if (!status) return;
  std::string message = ort::GetErrorMessage(api, status);
  ort::ReleaseStatus(api, status);
  throw Error(message);
}

// ONNX Runtime does not always say which attribute it means.
void check_attribute(const ort::OrtApi* api, ort::OrtStatus* status, const char* name, const char* kind) {
  try {
    check(api, status);
  } catch (const Error& error) {
    throw Error(std::string(name) + " is not there as " + kind + ": " + error.what());
  }
}

Tensor tensor_of(const ort::OrtApi* api, const char* name, const ort::OrtValue* value) {
  int type = 0;
  const int64_t* dims = nullptr;
  size_t rank = 0;
  void* data = nullptr;
  check(api, ort::GetTensorElementTypeAndShapeDataReference(api, value, &type, &dims, &rank));
  check(api, ort::GetTensorMutableData(api, const_cast<ort::OrtValue*>(value), &data));
  return Tensor(name, static_cast<Type>(type), data, dims, rank);
}

}  // namespace

int64_t Tensor::dim(int index) const {
  const int64_t rank = static_cast<int64_t>(rank_);
  const int64_t at = index < 0 ? rank + index : index;
  if (at < 0 || at >= rank) {
    throw Error(std::string(name_) + " is " + text(dims_, rank_) + ": more dimensions are expected.");
  }
  return dims_[at];
}

int64_t Tensor::size() const {
  int64_t result = 1;
  for (size_t i = 0; i < rank_; ++i) result *= dims_[i];
  return result;
}

int64_t Tensor::rows() const {
  dim(-1);
  int64_t result = 1;
  for (size_t i = 0; i + 1 < rank_; ++i) result *= dims_[i];
  return result;
}

void Tensor::expect(Shape shape) const {
  const int64_t* wanted = shape.begin();
  bool same = shape.rank() == rank_;
  for (size_t i = 0; same && i < rank_; ++i) {
    same = wanted[i] == kAny || wanted[i] == dims_[i] || (wanted[i] == kPositive && dims_[i] > 0);
  }
  if (!same) {
    throw Error(std::string(name_) + " is " + text(dims_, rank_) + ", expected " + text(wanted, shape.rank()) + ".");
  }
}

void Tensor::expect_rows_of(int64_t D) const {
  if (rank_ > 0 && dims_[rank_ - 1] == D) return;
  throw Error(std::string(name_) + " is " + text(dims_, rank_) + ", expected [..., " + std::to_string(D) + "].");
}

int64_t Node::integer(const char* name) const {
  int64_t value = 0;
  check_attribute(api_, ort::KernelInfoGetAttribute_int64(api_, info_, name, &value), name, "an integer");
  return value;
}

float Node::real(const char* name) const {
  float value = 0;
  check_attribute(api_, ort::KernelInfoGetAttribute_float(api_, info_, name, &value), name, "a float");
  return value;
}

Known::Known(const ort::OrtApi* api, const ort::OrtKernelInfo* info, const Op& op) : constants(op.inputs.size()) {
  check(api, ort::KernelInfo_GetInputCount(api, info, &inputs));
  check(api, ort::KernelInfo_GetOutputCount(api, info, &outputs));
  std::vector<Tensor> found(op.inputs.size());
  size_t ranks = 0;
  for (size_t i = 0; i < std::min(inputs, op.inputs.size()); ++i) {
    int is_constant = 0;
    const ort::OrtValue* value = nullptr;
    check(api, ort::KernelInfoGetConstantInput_tensor(api, info, i, &is_constant, &value));
    if (is_constant) found[i] = tensor_of(api, op.inputs[i].name, value);
    ranks += found[i].rank();
  }
  dims_.reserve(ranks);  // so that none is moved
  for (size_t i = 0; i < found.size(); ++i) {
    if (!found[i].present()) continue;
    const int64_t* dims = dims_.data() + dims_.size();
    dims_.insert(dims_.end(), found[i].shape().begin(), found[i].shape().end());
    constants[i] = Tensor(op.inputs[i].name, found[i].type(), found[i].data(), dims, found[i].rank());
  }
}

Tensor Run::input(size_t index) const {
  if (known_.constants.at(index).present()) return known_.constants[index];
  const ort::OrtValue* value = nullptr;
  if (index < known_.inputs) check(api_, ort::KernelContext_GetInput(api_, context_, index, &value));
  const Operand& operand = op_.inputs[index];
  if (value) return tensor_of(api_, operand.name, value);
  if (!operand.optional) throw Error(std::string("input ") + operand.name + " is missing.");
  return Tensor();
}

Tensor Run::output(size_t index, Shape shape) {
  ort::OrtValue* value = nullptr;
  if (index < known_.outputs) {
    check(api_, ort::KernelContext_GetOutput(api_, context_, index, shape.begin(), shape.rank(), &value));
  }
  const Operand& operand = op_.outputs.at(index);
  if (value) return tensor_of(api_, operand.name, value);
  if (!operand.optional) throw Error(std::string("output ") + operand.name + " is missing.");
  return Tensor();
}

void* Run::scratch(size_t bytes) const {
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
#if defined(__SANITIZE_ADDRESS__)
  constexpr bool kReused = false;  // a piece of its own each time, so that what is beyond it is noticed
#else
  constexpr bool kReused = true;
#endif
  thread_local std::unique_ptr<void, Free> memory;
  thread_local size_t size = 0;
  if (size < bytes || !kReused) {
    memory.reset();
    size = 0;
    void* made = nullptr;
    if (posix_memalign(&made, 64, bytes) != 0) throw std::bad_alloc();
    memory.reset(made);
    size = bytes;
  }
  return memory.get();
}

void Run::run(Function function, void* data, size_t count) const {
  // An exception must not pass through ONNX Runtime's threads: the first one waits here.
  struct Job {
    Function function;
    void* data;
    std::atomic<bool> failed;
    std::exception_ptr error;
  } job{function, data, {false}, nullptr};
  const auto guarded = [](void* data, size_t index) {
    Job& job = *static_cast<Job*>(data);
    try {
      job.function(job.data, index);
    } catch (...) {
      if (!job.failed.exchange(true)) job.error = std::current_exception();
    }
  };
  // As many batches as tasks: a thread that is done takes what is left, others may be held up.
  check(api_, ort::KernelContext_ParallelFor(api_, context_, guarded, count, count, &job));
  if (job.error) std::rethrow_exception(job.error);
}

Work& work() {
  static Work done;
  return done;
}

std::vector<Op>& ops() {
  static std::vector<Op> table;
  return table;
}

}  // namespace glm
