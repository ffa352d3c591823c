#include "emulator.h"

#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <deque>
#include <map>
#include <vector>

#include "guarded.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace glm {
namespace emulator {
namespace {

constexpr unsigned kMostThreads = 1024, kWarp = 32, kWarpgroup = 128, kBarriers = 16;
constexpr size_t kStackBytes = 64 * 1024;
constexpr unsigned char kGarbage = 0xff;  // NaN in every floating-point type here, -1 as an integer

Device device{90, 132, 227 * 1024};
char error_text[512];

uint32_t random_state = 1;

unsigned random_below(size_t n) {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 17;
  random_state ^= random_state << 5;
  return static_cast<unsigned>(random_state % n);
}

std::map<void*, Guarded*> buffers;

struct Copy {
  void* shared;
  const void* global;
  bool valid;
};

struct Fiber {
  ucontext_t fresh;
  jmp_buf where;
  bool started, waited;
  const char* waits_for;  // null while it can run
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> groups;
};

struct Waiting {
  unsigned thread;
  bool (*ready)(const void*);
  const void* state;
};

// Threads that come together.
struct Meeting {
  const char* what = nullptr;
  unsigned expected = 0;
  std::vector<unsigned> threads;
  void* payloads[kWarpgroup];
};

struct Block {
  std::vector<unsigned> ready;
  std::vector<Waiting> waiting;
  Meeting warps[kMostThreads / kWarp], warpgroups[kMostThreads / kWarpgroup], barriers[kBarriers];
  unsigned done = 0;
};

Fiber fibers[kMostThreads];
Guarded* stacks;
Guarded* shared;
Block block;
const Thread* body;
unsigned running;
jmp_buf scheduler, failed;

// The scheduler's own stack must not be the one that a fault happened on.
void back_to_scheduler() { _longjmp(scheduler, 1); }

void pause(const char* what) {
  fibers[running].waits_for = what;
  if (_setjmp(fibers[running].where) == 0) back_to_scheduler();
}

void resume_others(const std::vector<unsigned>& threads) {
  for (unsigned thread : threads) {
    fibers[thread].waits_for = nullptr;
    if (thread != running) block.ready.push_back(thread);
  }
}

void fiber_main() {
  Fiber& me = fibers[running];
  body->run(body->arguments);
  if (!me.waited) fail("the kernel ended without wait_for_previous_kernel()");
  if (!me.open.empty() || !me.groups.empty()) fail("the kernel ended with asynchronous copies that nobody waited for");
  ++block.done;
  back_to_scheduler();
}

void start(unsigned thread) {
  Fiber& fiber = fibers[thread];
  getcontext(&fiber.fresh);
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  fiber.fresh.uc_stack.ss_sp = stacks->begin() + thread * (kStackBytes + page) + page;
  fiber.fresh.uc_stack.ss_size = kStackBytes;
  fiber.fresh.uc_link = nullptr;
  makecontext(&fiber.fresh, fiber_main, 0);
  setcontext(&fiber.fresh);
}

void resume(unsigned thread) {
  running = thread;
  threadIdx = {thread, 0, 0};
  if (_setjmp(scheduler) != 0) return;
  if (fibers[thread].started) _longjmp(fibers[thread].where, 1);
  fibers[thread].started = true;
  start(thread);
}

[[noreturn]] void give_up(const char* text) {
  std::snprintf(error_text, sizeof error_text, "%s (block %u, %u, %u, thread %u)", text, blockIdx.x, blockIdx.y,
                blockIdx.z, running);
  _longjmp(failed, 1);
}

[[noreturn]] void deadlock() {
  for (running = 0; running < blockDim.x; ++running) {
    if (!fibers[running].waits_for) continue;
    unsigned same = 0;
    for (unsigned i = 0; i < blockDim.x; ++i) {
      same += fibers[i].waits_for && std::strcmp(fibers[i].waits_for, fibers[running].waits_for) == 0;
    }
    fail("nobody can go on: %u of %u threads are in %s, %u have ended", same, blockDim.x, fibers[running].waits_for,
         block.done);
  }
  std::abort();
}

std::vector<void (*)()>& block_starts() {
  static std::vector<void (*)()> all;
  return all;
}

void run_block() {
  std::memset(shared->begin(), kGarbage, shared->bytes());
  for (void (*reset)() : block_starts()) reset();
  block = Block();
  for (unsigned i = 0; i < blockDim.x; ++i) {
    fibers[i].started = fibers[i].waited = false;
    fibers[i].waits_for = nullptr;
    fibers[i].open.clear();
    fibers[i].groups.clear();
    block.ready.push_back(i);
  }
  while (block.done < blockDim.x) {
    if (block.ready.empty()) {
      std::vector<Waiting> still;
      for (const Waiting& w : block.waiting) {
        if (w.ready(w.state)) {
          fibers[w.thread].waits_for = nullptr;
          block.ready.push_back(w.thread);
        } else {
          still.push_back(w);
        }
      }
      block.waiting.swap(still);
      if (block.ready.empty()) deadlock();
    }
    std::swap(block.ready[random_below(block.ready.size())], block.ready.back());
    const unsigned next = block.ready.back();
    block.ready.pop_back();
    resume(next);
  }
  if (!shared->intact()) fail("somebody wrote behind the shared memory");
}

void meet(Meeting& meeting, const char* what, unsigned expected, unsigned place, void* mine, Act act) {
  if (meeting.threads.empty()) {
    meeting.what = what;
    meeting.expected = expected;
  } else if (std::strcmp(meeting.what, what) != 0 || meeting.expected != expected) {
    fail("came to %s of %u threads while others are in %s of %u", what, expected, meeting.what, meeting.expected);
  }
  meeting.threads.push_back(running);
  if (act) meeting.payloads[place] = mine;
  if (meeting.threads.size() < expected) {
    pause(what);
    return;
  }
  if (act) act(meeting.payloads);
  std::vector<unsigned> threads;
  threads.swap(meeting.threads);
  resume_others(threads);
}

void collective(Meeting* meetings, unsigned size, const char* what, void* mine, Act act) {
  const unsigned first = running / size * size;
  if (first + size > blockDim.x) fail("%s in a part of %u threads that is not whole", what, size);
  meet(meetings[running / size], what, size, running % size, mine, act);
}

// What the address says about a fault.
void describe(const void* address, char* text, size_t size) {
  for (const auto& [begin, buffer] : buffers) {
    if (!buffer->near(address)) continue;
    std::snprintf(text, size, "an access that is not allowed at offset %td of a buffer of %zu bytes",
                  static_cast<const unsigned char*>(address) - buffer->begin(), buffer->bytes());
    return;
  }
  if (shared->near(address)) {
    std::snprintf(text, size, "an access at offset %td of %zu bytes of shared memory",
                  static_cast<const unsigned char*>(address) - shared->begin(), shared->bytes());
  } else if (stacks->near(address)) {
    std::snprintf(text, size, "the stack of %zu bytes is full", kStackBytes);
  } else {
    std::snprintf(text, size, "an access to no memory of the kernel (%p)", address);
  }
}

void on_fault(int signal, siginfo_t* info, void*) {
  char text[256];
  if (signal == SIGILL || signal == SIGTRAP) {
    std::snprintf(text, sizeof text, "undefined behaviour: a misaligned access, or an index or shift out of range");
  } else if (signal == SIGFPE) {
    std::snprintf(text, sizeof text, "an integer division by zero");
  } else {
    describe(info->si_addr, text, sizeof text);
  }
  give_up(text);
}

constexpr int kSignals[] = {SIGSEGV, SIGBUS, SIGILL, SIGTRAP, SIGFPE};

// Turns faults into errors while a launch runs.
class Faults {
 public:
  Faults() {
    static unsigned char stack[64 * 1024];
    stack_t own{};
    own.ss_sp = stack;
    own.ss_size = sizeof stack;
    sigaltstack(&own, &old_stack_);
    struct sigaction action{};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    for (size_t i = 0; i < std::size(kSignals); ++i) sigaction(kSignals[i], &action, &old_[i]);
  }
  ~Faults() {
    for (size_t i = 0; i < std::size(kSignals); ++i) sigaction(kSignals[i], &old_[i], nullptr);
    sigaltstack(&old_stack_, nullptr);
  }

 private:
  struct sigaction old_[std::size(kSignals)];
  stack_t old_stack_;
};

bool takes(const Launch& what) {
  const dim3& g = what.grid;
  if (what.threads < 1 || what.threads > kMostThreads || g.x < 1 || g.y < 1 || g.z < 1 || g.x > 0x7fffffffu ||
      g.y > 65535 || g.z > 65535 || what.shared_bytes > static_cast<size_t>(device.shared_bytes)) {
    std::snprintf(error_text, sizeof error_text, "no GPU takes grid %u, %u, %u, %u threads, %zu bytes of shared memory",
                  g.x, g.y, g.z, what.threads, what.shared_bytes);
    return false;
  }
  return true;
}

void prepare_stacks() {
  if (stacks) return;
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  stacks = new Guarded(kMostThreads * (kStackBytes + page), page);
  for (unsigned i = 0; i < kMostThreads; ++i) {
    mprotect(stacks->begin() + i * (kStackBytes + page), page, PROT_NONE);
  }
}

void run_grid(const Launch& what) {
  gridDim = what.grid;
  blockDim = dim3(what.threads);
  const size_t count = size_t{what.grid.x} * what.grid.y * what.grid.z;
  std::vector<unsigned> order(count);
  for (size_t i = 0; i < count; ++i) order[i] = static_cast<unsigned>(i);
  for (size_t i = count; i > 1; --i) std::swap(order[i - 1], order[random_below(i)]);
  for (unsigned i : order) {
    blockIdx = {i % gridDim.x, i / gridDim.x % gridDim.y, i / gridDim.x / gridDim.y};
    run_block();
  }
}

}  // namespace

int run(const Thread& thread, const Launch& what) {
  if (!takes(what)) return kRuntimeError + 1;
  prepare_stacks();
  body = &thread;
  shared = new Guarded(what.shared_bytes, 1024);
  int code = 0;
  {
    const Faults faults;
    if (_setjmp(failed) == 0) {
      run_grid(what);
    } else {
      code = kRuntimeError + 2;
    }
  }
  delete shared;
  return code;
}

void fail(const char* format, ...) {
  char text[384];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  give_up(text);
}

void warp(const char* what, void* mine, Act act) { collective(block.warps, kWarp, what, mine, act); }

void warpgroup(const char* what, void* mine, Act act) { collective(block.warpgroups, kWarpgroup, what, mine, act); }

void barrier(int id, unsigned threads) {
  if (id < 0 || id >= static_cast<int>(kBarriers)) fail("there is no barrier %d", id);
  if (threads == 0 || threads % kWarp != 0 || threads > blockDim.x) {
    if (id != 0) fail("barrier %d of %u threads in a block of %u", id, threads, blockDim.x);
  }
  static const char* const kNames[kBarriers] = {"block_sync",    "block_sync 1",  "block_sync 2",  "block_sync 3",
                                                "block_sync 4",  "block_sync 5",  "block_sync 6",  "block_sync 7",
                                                "block_sync 8",  "block_sync 9",  "block_sync 10", "block_sync 11",
                                                "block_sync 12", "block_sync 13", "block_sync 14", "block_sync 15"};
  meet(block.barriers[id], kNames[id], threads, 0, nullptr, nullptr);
}

void wait_until(const char* what, bool (*ready)(const void*), const void* state) {
  if (ready(state)) return;
  block.waiting.push_back({running, ready, state});
  pause(what);
}

void at_block_start(void (*reset)()) { block_starts().push_back(reset); }

unsigned char* shared_memory() { return shared->begin(); }

void expect_shared(const char* what, const void* pointer, size_t bytes, size_t alignment) {
  const auto* begin = static_cast<const unsigned char*>(pointer);
  if (reinterpret_cast<uintptr_t>(pointer) % alignment != 0) fail("%s: the address is not aligned", what);
  if (begin < shared->begin() || begin + bytes > shared->end()) {
    fail("%s: %zu bytes at offset %td of %zu bytes of shared memory", what, bytes, begin - shared->begin(),
         shared->bytes());
  }
}

void copy_async(void* to, const void* global, bool valid) {
  expect_shared("copy_async_16", to, 16, 16);
  if (valid && reinterpret_cast<uintptr_t>(global) % 16 != 0) fail("copy_async_16: the source is not aligned");
  std::memset(to, kGarbage, 16);
  fibers[running].open.push_back({to, global, valid});
}

void copy_async_commit() {
  Fiber& me = fibers[running];
  me.groups.push_back({});
  me.groups.back().swap(me.open);
}

void copy_async_wait(size_t pending) {
  auto& groups = fibers[running].groups;
  for (; groups.size() > pending; groups.pop_front()) {
    for (const Copy& copy : groups.front()) {
      if (copy.valid) {
        std::memcpy(copy.shared, copy.global, 16);
      } else {
        std::memset(copy.shared, 0, 16);
      }
    }
  }
}

void waited_for_previous_kernel() { fibers[running].waited = true; }

}  // namespace emulator

const char* runtime_error_text(int) { return emulator::error_text; }

int current_device(Device& device) {
  device = emulator::device;
  return 0;
}

}  // namespace glm

using glm::emulator::Guarded;

extern "C" void glm_cuda_emulator_seed(uint32_t seed) { glm::emulator::random_state = seed * 2654435761u | 1u; }

extern "C" void glm_cuda_emulator_device(int32_t sm, int32_t multiprocessors, int32_t shared_bytes) {
  glm::emulator::device = {sm, multiprocessors, shared_bytes};
}

extern "C" void* glm_cuda_emulator_allocate(int64_t bytes, int64_t alignment) {
  auto* buffer = new Guarded(static_cast<size_t>(bytes), static_cast<size_t>(alignment));
  std::memset(buffer->begin(), glm::emulator::kGarbage, buffer->bytes());
  glm::emulator::buffers[buffer->begin()] = buffer;
  return buffer->begin();
}

extern "C" void glm_cuda_emulator_protect(void* buffer) { glm::emulator::buffers.at(buffer)->protect(PROT_READ); }

extern "C" int32_t glm_cuda_emulator_free(void* buffer) {
  const auto found = glm::emulator::buffers.find(buffer);
  const Guarded* guarded = found->second;
  const int32_t damaged = guarded->intact() ? 0 : 1;
  delete guarded;
  glm::emulator::buffers.erase(found);
  return damaged;
}
