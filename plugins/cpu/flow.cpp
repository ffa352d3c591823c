#include "plugins/cpu/flow.h"

#include <algorithm>
#include <thread>

namespace glm {
namespace {

// More than ONNX Runtime has threads of, as a rule; a worker who comes when all is done costs nothing. Asking the
// system takes as long as a stage, so it is asked once.
size_t most_threads() {
  static const size_t count = std::max(1u, std::thread::hardware_concurrency());
  return count;
}

// Waiting takes microseconds, unless the thread that is waited for has lost its processor.
void pause(size_t turn) {
  constexpr size_t kSpins = 4096;
  if (turn >= kSpins) {
    std::this_thread::yield();
    return;
  }
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

}  // namespace

Flow::Done Flow::stage(Stage stage) {
  const Done bit = Done{1} << stages_.size();
  if (stage.tasks == 0) done_ |= bit;
  stages_.emplace_back(std::move(stage));
  return bit;
}

void Flow::run(const Parallel& parallel) {
  size_t most = 0;
  for (const Live& live : stages_) most = std::max(most, live.stage.tasks);
  workers_ = std::min(most, most_threads());
  for (Live& live : stages_) {
    live.lanes.reset(new Lane[workers_]);
    for (size_t w = 0; w < workers_; ++w) {
      live.lanes[w].next = live.stage.tasks * w / workers_;
      live.lanes[w].end = live.stage.tasks * (w + 1) / workers_;
    }
  }
  parallel(workers_, [this](size_t worker) { work(worker); });
}

void Flow::work(size_t worker) {
  try {
    for (size_t s = 0; s < stages_.size(); ++s) {
      for (size_t w = 0; w < workers_; ++w) {
        Lane& lane = stages_[s].lanes[(worker + w) % workers_];
        for (size_t index; lane.next < lane.end && (index = lane.next++) < lane.end;) {
          execute(s, index);
        }
      }
    }
  } catch (...) {
    failed_ = true;
    throw;
  }
}

void Flow::execute(size_t s, size_t index) {
  Live& live = stages_[s];
  if (!wait_for(live.stage.needs)) return;
  live.stage.task(index);
  if (live.left.fetch_sub(1, std::memory_order_acq_rel) == 1) done_.fetch_or(Done{1} << s, std::memory_order_release);
}

// Returns false if something failed. It does not wait in vain: all tasks of earlier stages have been begun, by threads
// that are at work on them or wait for still earlier ones.
bool Flow::wait_for(Done needs) const {
  for (size_t turn = 0; (done_.load(std::memory_order_acquire) & needs) != needs; ++turn) {
    if (failed_) return false;
    pause(turn);
  }
  return true;
}

}  // namespace glm
