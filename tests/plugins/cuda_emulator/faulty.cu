// Kernels that are wrong in one way each, for the tests of what the emulator sees.
#include "plugins/cuda/device.cuh"

namespace {

using namespace glm;

void half_of_a_warp(float* out) {
  wait_for_previous_kernel();
  if (threadIdx.x < 16) out[threadIdx.x] = shuffle_xor(1.0f, 1);
}

void two_collectives(float* out) {
  wait_for_previous_kernel();
  out[threadIdx.x] = threadIdx.x < 16 ? shuffle_xor(1.0f, 1) : static_cast<float>(warp_max(1));
}

void half_at_a_barrier() {
  wait_for_previous_kernel();
  if (threadIdx.x < 32) block_sync();
}

void access(float* out, int at) {
  wait_for_previous_kernel();
  if (threadIdx.x == 3) out[at] = 1;
}

void misaligned(const float* in, float* out) {
  wait_for_previous_kernel();
  const auto x = *reinterpret_cast<const float4*>(in + 1);
  out[threadIdx.x] = x.x;
}

void behind_shared_memory(int at) {
  wait_for_previous_kernel();
  shared_memory()[at] = 1;
}

void impolite(float* out) { out[0] = 1; }

void deep(float* out, int depth) {
  wait_for_previous_kernel();
  volatile char frame[4096];
  frame[depth % 4096] = static_cast<char>(depth);
  if (depth > 0) deep(out, depth - 1);
  out[0] = frame[depth % 4096];
}

void spin(float* out) {
  wait_for_previous_kernel();
  auto* flag = reinterpret_cast<volatile int*>(shared_memory());
  if (threadIdx.x == 0) *flag = 0;
  block_sync();
  if (threadIdx.x == 33) *flag = 1;
  emulator::wait_until(
      "spin", [](const void* state) { return *static_cast<const volatile int*>(state) == 1; }, const_cast<int*>(flag));
  out[threadIdx.x] = 1;
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

const char* probe_error() { return runtime_error_text(0); }

int probe_half_of_a_warp(float* out) { return launch(half_of_a_warp, {1, 32, 0, nullptr}, out); }
int probe_two_collectives(float* out) { return launch(two_collectives, {1, 32, 0, nullptr}, out); }
int probe_part_of_a_warp(float* out) { return launch(two_collectives, {1, 16, 0, nullptr}, out); }
int probe_half_at_a_barrier() { return launch(half_at_a_barrier, {1, 64, 0, nullptr}); }
int probe_access(float* out, int at) { return launch(access, {2, 32, 0, nullptr}, out, at); }
int probe_misaligned(const float* in, float* out) { return launch(misaligned, {1, 32, 0, nullptr}, in, out); }
int probe_behind_shared_memory(int at) { return launch(behind_shared_memory, {1, 1, 100, nullptr}, at); }
int probe_impolite(float* out) { return launch(impolite, {1, 1, 0, nullptr}, out); }
int probe_deep(float* out, int depth) { return launch(deep, {1, 1, 0, nullptr}, out, depth); }
int probe_spin(float* out) { return launch(spin, {1, 64, 4, nullptr}, out); }
int probe_shape(int x, int y, int threads, int shared_bytes) {
  return launch(half_at_a_barrier, {dim3(static_cast<unsigned>(x), static_cast<unsigned>(y)),
                                    static_cast<unsigned>(threads), static_cast<size_t>(shared_bytes), nullptr});
}
}
