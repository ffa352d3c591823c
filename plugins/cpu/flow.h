// Stages of tasks in one parallel loop, where threads go from stage to stage without coming back.
//
// A stage names the earlier ones whose results it needs. A thread that comes to it too soon waits; so a step that one
// thread does alone is hidden if a stage that does not depend on it is put between. Of every stage, each thread has a
// run of neighbouring tasks, so that weights that lie one after the other are one stream, and helps others when it is
// done with its own.
//
//   Flow flow;
//   const Flow::Done chosen = flow.stage({tasks_of(router), packed, multiply_router});
//   const Flow::Done shared = flow.stage({tasks_of(shared), packed, multiply_shared});
//   flow.stage({tasks_of(routed), chosen, multiply_routed});
//   flow.run(parallel);
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>

#include "plugins/cpu/kernel.h"

namespace glm {

class Flow {
 public:
  // Stages, a bit each.
  using Done = uint32_t;

  struct Stage {
    size_t tasks;
    Done needs;
    std::function<void(size_t index)> task;
  };

  // Adds a stage. There are 32 at most.
  Done stage(Stage stage);

  // Runs them. What a task throws is thrown again; of the others, some may not have run.
  void run(const Parallel& parallel);

 private:
  // Tasks next .. end - 1 of a stage have not begun.
  struct alignas(64) Lane {
    std::atomic<size_t> next;
    size_t end;
  };

  struct Live {
    explicit Live(Stage s) : stage(std::move(s)), left(stage.tasks) {}
    Stage stage;
    std::atomic<size_t> left;
    std::unique_ptr<Lane[]> lanes;
  };

  void work(size_t worker);
  void execute(size_t s, size_t index);
  bool wait_for(Done needs) const;

  std::deque<Live> stages_;
  size_t workers_ = 0;
  std::atomic<Done> done_{0};
  std::atomic<bool> failed_{false};
};

}  // namespace glm
