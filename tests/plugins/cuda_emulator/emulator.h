// Runs CUDA kernels on the CPU, one block after the other, and fails where a GPU would only misbehave.
//
// Every thread of a block is a fiber that runs until it has to wait: at a barrier, in a warp collective, for a
// condition. Which fiber goes on next and which block comes next is drawn by a seeded generator, so that a missing
// barrier meets an order that shows it. What is caught, and how:
//   - threads that do not all come to a collective, or come to different ones: the launch fails and says who waits;
//   - reads of shared memory that nobody wrote, or of an asynchronous copy before its wait: the memory holds NaN;
//   - accesses outside a buffer from allocate(), and writes to a protected one: nothing is accessible for a megabyte on
//     either side;
//   - writes behind the block's shared memory, or in the slack behind a buffer: a canary;
//   - misaligned vector accesses, shifts and indices out of range: the kernels are compiled with trapping
//     -fsanitize=undefined;
//   - launches that no GPU takes (threads, grid, shared memory), kernels that do not wait for the one before them.
// It says nothing about speed, and knows nothing of races between blocks that no order of whole blocks shows.
#pragma once

#include <cstddef>
#include <cstdint>

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// Of the running fiber, as in CUDA.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace glm {

constexpr int kRuntimeError = 1 << 16;
const char* runtime_error_text(int code);

struct Device {
  int sm = 0;
  int multiprocessors = 0;
  int shared_bytes = 0;
};
int current_device(Device& device);

struct Launch {
  dim3 grid;
  unsigned threads;
  size_t shared_bytes;
  void* stream;
};

namespace emulator {

// The kernel with its arguments, as one thread calls it.
struct Thread {
  void (*run)(const void* arguments);
  const void* arguments;
};

// Runs a grid; 0 or an error code.
int run(const Thread& thread, const Launch& what);

// Ends the launch, from inside a fiber, with a sentence.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// What all threads of a group do together: each brings its own `mine`, and the last to come calls `act` with those of
// all, in the order of the threads. `what` names it, and has to be the same for all.
using Act = void (*)(void* const* all);
void warp(const char* what, void* mine, Act act);
void warpgroup(const char* what, void* mine, Act act);
void barrier(int id, unsigned threads);

// Lets others run until `ready(state)`.
void wait_until(const char* what, bool (*ready)(const void* state), const void* state);

// For what a block keeps elsewhere: `reset` is called before every block, also after one that failed.
void at_block_start(void (*reset)());

unsigned char* shared_memory();
// Fails unless `bytes` bytes from `pointer` on lie in the block's shared memory, and it is a multiple of `alignment`.
void expect_shared(const char* what, const void* pointer, size_t bytes, size_t alignment);

void copy_async(void* shared, const void* global, bool valid);
void copy_async_commit();
void copy_async_wait(size_t pending);

void waited_for_previous_kernel();

}  // namespace emulator
}  // namespace glm

// For the tests.
extern "C" {
#pragma GCC visibility push(default)
// Orders of threads and blocks follow from it.
void glm_cuda_emulator_seed(uint32_t seed);
// The device that launchers find.
void glm_cuda_emulator_device(int32_t sm, int32_t multiprocessors, int32_t shared_bytes);
// `bytes` bytes full of NaN that end (but for the alignment) where nothing is accessible; nothing is before them
// either.
void* glm_cuda_emulator_allocate(int64_t bytes, int64_t alignment);
// From now on it can only be read.
void glm_cuda_emulator_protect(void* buffer);
// 0, or 1 if somebody wrote into the slack behind it.
int32_t glm_cuda_emulator_free(void* buffer);
#pragma GCC visibility pop
}
