// flow.h on threads of its own, where the thread sanitizer can follow it; says what went wrong and ends with 1.
// With PLANTED defined, a stage does not name one that it needs.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "plugins/cpu/flow.h"

namespace {

using glm::Flow;

void expect(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "%s\n", what);
  std::exit(1);
}

// As many threads as it is told, each of which takes calls until there are none.
class Threads : public glm::Parallel {
 public:
  explicit Threads(size_t count) : count_(count) {}

 private:
  void run(Function function, void* data, size_t count) const override {
    std::atomic<size_t> next{0};
    std::exception_ptr error;
    std::atomic<bool> failed{false};
    const auto work = [&] {
      for (size_t i; (i = next++) < count;) {
        try {
          function(data, i);
        } catch (...) {
          if (!failed.exchange(true)) error = std::current_exception();
        }
      }
    };
    std::vector<std::thread> threads;
    for (size_t i = 1; i < count_; ++i) threads.emplace_back(work);
    work();
    for (std::thread& thread : threads) thread.join();
    if (error) std::rethrow_exception(error);
  }

  size_t count_;
};

// Four stages of plain memory, which the sanitizer watches: each reads all that those it needs have written.
void stages_wait(const Threads& threads, size_t tasks, size_t slow) {
  std::vector<int> first(tasks), alone(1), beside(tasks), last(tasks);
  Flow flow;
  const Flow::Done one = flow.stage({tasks, 0, [&](size_t i) {
                                       if (i == slow) std::this_thread::sleep_for(std::chrono::milliseconds(1));
                                       first[i] += 1;
                                     }});
  const Flow::Done two = flow.stage({1, one, [&](size_t) {
                                       for (int value : first) alone[0] += value;
                                     }});
  const Flow::Done three = flow.stage({tasks, 0, [&](size_t i) { beside[i] += 2; }});
  const Flow::Done none = flow.stage({0, two, [](size_t) { std::abort(); }});
#ifdef PLANTED
  const Flow::Done needed = three | none;
#else
  const Flow::Done needed = two | three | none;
#endif
  flow.stage({tasks, needed, [&](size_t i) {
                last[i] += alone[0];
                for (int value : beside) last[i] += value;
              }});
  flow.run(threads);
  for (int value : last) expect(value == static_cast<int>(3 * tasks), "a task ran twice, never or too early");
}

// What a task throws comes out, and threads that wait for its stage go home.
void failures_come_out(const Threads& threads) {
  Flow flow;
  const Flow::Done one = flow.stage({8, 0, [](size_t i) {
                                       if (i == 5) throw std::runtime_error("five");
                                     }});
  flow.stage({8, one, [](size_t) { std::abort(); }});
  bool thrown = false;
  try {
    flow.run(threads);
  } catch (const std::runtime_error& error) {
    thrown = std::string(error.what()) == "five";
  }
  expect(thrown, "an error did not come out");
}

}  // namespace

int main() {
  for (size_t count : {1, 2, 3, 8}) {
    const Threads threads(count);
    for (size_t tasks : {1, 2, 7, 64}) {
      for (size_t slow : {size_t{0}, tasks / 2, tasks - 1}) stages_wait(threads, tasks, slow);
    }
    for (int i = 0; i < 50; ++i) failures_come_out(threads);
  }
  Flow nothing;
  nothing.run(Threads(2));
}
