// An op that tells what reaches a kernel through the library's glue, and that fails or misbehaves on request.
#include <atomic>
#include <new>

#include "plugins/cpu/op.h"

namespace glm {
namespace {

class Probe : public Kernel {
 public:
  explicit Probe(const Node& node)
      : whole_(node.integer("whole")), part_(node.real("part")), fail_(node.integer("fail")) {
    if (fail_ == 1) throw Error("fail is 1, expected anything else.");
  }

  void compute(Run& run) const override {
    const Tensor x = run.input(0), middle = run.input(1), last = run.input(2);
    if (fail_ == 2) x.expect({-1, 5});
    if (fail_ == 3) throw std::bad_alloc();
    if (fail_ == 4) throw 4;
    const Tensor y = run.output(0, x.shape());
    if (y.data() != x.data()) std::memcpy(y.data(), x.data(), static_cast<size_t>(x.size()) * size_of(x.type()));
    std::atomic<int> sum{0};
    run.parallel()(100, [&](size_t i) {
      if (fail_ == 5 && i == 50) throw Error("task 50 gave up.");
      sum += static_cast<int>(i);
    });
    char* scratch = static_cast<char*>(run.scratch(1000));
    std::memset(scratch, 1, 1000);
    const Tensor asked = run.output(2, {2, 0});
    const float report[] = {
        static_cast<float>(whole_),
        part_,
        static_cast<float>(x.type()),
        static_cast<float>(x.rank()),
        middle.present() ? static_cast<float>(middle.type()) : 0.0f,
        last.present() ? last.as<float>()[0] : 0.0f,
        asked.present() ? 1.0f : 0.0f,
        y.data() == x.data() ? 1.0f : 0.0f,
        static_cast<float>(sum),
        reinterpret_cast<uintptr_t>(scratch) % 64 ? 0.0f : 1.0f,
        static_cast<float>(static_cast<int>(isa_)),
    };
    misbehave(x.as<char>() + static_cast<size_t>(x.size()) * size_of(x.type()),
              y.as<char>() + static_cast<size_t>(y.size()) * size_of(y.type()), scratch + 1000);
    std::memcpy(run.output(1, {sizeof report / sizeof report[0]}).data(), report, sizeof report);
  }

 private:
  // What only a sanitizer sees. All three point behind the end of what is theirs.
  void misbehave(volatile char* x, volatile char* y, volatile char* scratch) const {
    if (fail_ == 6) (void)*x;
    if (fail_ == 7) *y = 1;
    if (fail_ == 8) *scratch = 1;
    volatile int32_t large = INT32_MAX;
    if (fail_ == 9) large = large + 1;
  }

  int64_t whole_;
  float part_;
  int64_t fail_;
  Isa isa_ = isa();
};

const Register<Probe> kProbe{
    "Probe",
    {{"x", kCompute}, {"middle", kF32 | kI64 | kE4m3, nullptr, true}, {"last", kF32, nullptr, true}},
    {{"y", kCompute, "x"}, {"report", kF32}, {"asked", kF32, nullptr, true}}};

}  // namespace
}  // namespace glm
