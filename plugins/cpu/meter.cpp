// The meter for callers outside. Its threads are its own: there is no ONNX Runtime where a machine is measured. All
// start together, and the time is that from the first one's start to the last one's end.
#include "plugins/cpu/meter.h"

#if defined(__linux__)
#include <sched.h>
#endif

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <random>
#include <thread>
#include <vector>

#include "plugins/cpu/op.h"

namespace glm {
namespace {

constexpr size_t kLine = 8;  // words that come from memory together

const Meter& meter(Isa isa) {
#if defined(__x86_64__)
  if (isa >= Isa::avx512) return kMeterAvx512;
  if (isa >= Isa::avx2) return kMeterAvx2;
#endif
  (void)isa;
  return kMeterScalar;
}

// Of the CPUs that this process may use; where that can not be said, the thread stays wherever it is put.
void stay_on_cpu(size_t index) {
#if defined(__linux__)
  cpu_set_t allowed, own;
  if (sched_getaffinity(0, sizeof allowed, &allowed)) return;
  size_t skip = index % static_cast<size_t>(CPU_COUNT(&allowed));
  for (size_t cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (!CPU_ISSET(cpu, &allowed) || skip--) continue;
    CPU_ZERO(&own);
    CPU_SET(cpu, &own);
    sched_setaffinity(0, sizeof own, &own);
    return;
  }
#else
  (void)index;
#endif
}

// Several threads that run a task at the same time, each on a CPU of its own: left alone, new threads may share one for
// as long as a measurement takes.
class Team {
 public:
  // task(index) for every index below `size`. Returns seconds.
  template <class Task>
  static double seconds(size_t size, const Task& task) {
    std::vector<Clock::time_point> begin(size), end(size);
    {
      Team team(size);
      for (size_t i = 0; i < size; ++i) {
        team.start([&, i] {
          if (!team.everybody_is_here(i)) return;
          begin[i] = Clock::now();
          task(i);
          end[i] = Clock::now();
        });
      }
    }
    const auto first = *std::min_element(begin.begin(), begin.end());
    const auto last = *std::max_element(end.begin(), end.end());
    return std::chrono::duration<double>(last - first).count();
  }

 private:
  using Clock = std::chrono::steady_clock;

  explicit Team(size_t size) : size_(size) {}

  // If a thread could not be made, those that were leave without having done anything.
  ~Team() {
    if (threads_.size() < size_) left_ = true;
    for (std::thread& thread : threads_) thread.join();
  }

  template <class Body>
  void start(const Body& body) {
    threads_.emplace_back(body);
  }

  bool everybody_is_here(size_t index) {
    stay_on_cpu(index);
    ready_.fetch_add(1);
    while (ready_ < size_ && !left_) std::this_thread::yield();  // waking up would take too long
    return !left_;
  }

  const size_t size_;
  std::vector<std::thread> threads_;
  std::atomic<size_t> ready_{0};
  std::atomic<bool> left_{false};
};

double read(const uint64_t* memory, size_t words, size_t block, size_t threads, uint64_t* sum) {
  const Meter& loops = meter(isa());
  std::vector<size_t> order(ceil_div(words, block));
  for (size_t i = 0; i < order.size(); ++i) order[i] = i;
  std::shuffle(order.begin(), order.end(), std::mt19937(0));
  std::atomic<uint64_t> total{0};
  const double seconds = Team::seconds(threads, [&](size_t thread) {
    uint64_t own = 0;
    for (size_t at : order) {  // its share of each block
      const size_t first = at * block, size = std::min(block, words - first);
      const auto until = [&](size_t part) { return part == threads ? size : size / kLine * part / threads * kLine; };
      own += loops.read(memory + first + until(thread), until(thread + 1) - until(thread));
    }
    total += own;
  });
  *sum = total;
  return seconds;
}

double multiply(Type type, size_t rounds, size_t threads) {
  const Arithmetic arithmetic = type == Type::bf16 ? meter(isa()).bf16 : meter(isa()).f32;
  if (!arithmetic.flops) return 0;
  std::atomic<bool> sound{true};
  const double seconds = Team::seconds(threads, [&](size_t) {
    if (arithmetic.run(rounds) != 0) sound = false;  // zeros only: it can not be
  });
  return sound ? static_cast<double>(arithmetic.flops * rounds * threads) / seconds : -1;
}

// A measurement, or -1 if GLM_EXPORT_CPU is wrong or there is no thread to be had.
template <class Body>
double guarded(const Body& body) {
  try {
    return body();
  } catch (const std::exception&) {
    return -1;
  }
}

}  // namespace
}  // namespace glm

#define GLM_EXPORT extern "C" __attribute__((visibility("default")))

// Reads `words` 64-bit words in blocks of `block` in random order, each block by all threads, a share each; one block
// is everything in order. `sum` becomes their wrapping sum. Returns seconds, or -1.
GLM_EXPORT double glm_meter_read(const uint64_t* memory, size_t words, size_t block, size_t threads, uint64_t* sum) {
  return glm::guarded([&] { return glm::read(memory, words, block, threads, sum); });
}

// Multiplies and adds in registers, `type` being an ONNX number: float32, or bfloat16 with float32 sums. Returns
// operations (products and sums) per second of all threads together, 0 where there is no instruction for it, or -1.
GLM_EXPORT double glm_meter_multiply(int32_t type, size_t rounds, size_t threads) {
  return glm::guarded([&] { return glm::multiply(static_cast<glm::Type>(type), rounds, threads); });
}
