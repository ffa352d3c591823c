// One kernel per group of wrappers of device.cuh, for the emulator and for GPUs: both have to give the same numbers.
#include "plugins/cuda/device.cuh"

namespace {

using namespace glm;

// out[i] = the input of the block's thread on the other side, through shared memory.
__global__ void reverse(const float* in, float* out, int barrier) {
  wait_for_previous_kernel();
  auto* shared = reinterpret_cast<float*>(shared_memory());
  const unsigned mine = blockIdx.x * blockDim.x + threadIdx.x;
  shared[threadIdx.x] = in[mine];
  if (barrier) block_sync();
  out[mine] = shared[blockDim.x - 1 - threadIdx.x];
}

__global__ void copies(const float* in, float* out, int committed, int waited, int offset) {
  wait_for_previous_kernel();
  auto* mine = reinterpret_cast<float*>(shared_memory()) + 4 * threadIdx.x;
  mine[0] = 7;
  copy_async_16(mine, in + 4 * threadIdx.x + offset, threadIdx.x != 1);
  if (committed) copy_async_commit();
  if (waited == 1) copy_async_wait<0>();
  if (waited == 2) copy_async_wait<1>();
  for (int i = 0; i < 4; ++i) out[4 * threadIdx.x + i] = mine[i];
}

// Every two warps go through a barrier of their own.
__global__ void named_barriers(float* out) {
  wait_for_previous_kernel();
  auto* shared = reinterpret_cast<float*>(shared_memory());
  const unsigned pair = threadIdx.x / 64;
  shared[threadIdx.x] = static_cast<float>(threadIdx.x);
  block_sync(static_cast<int>(1 + pair), 64);
  out[threadIdx.x] = shared[threadIdx.x ^ 63];
}

// d [16, 8] = a [16, K] b^T, b [8, K] (both row by row, 32 bytes of K), loaded by ldmatrix and stored by the layout of
// the accumulators.
__global__ void product(const unsigned char* a, const unsigned char* b, float* d, int type) {
  wait_for_previous_kernel();
  unsigned char* shared = shared_memory();
  const unsigned lane = threadIdx.x;
  for (unsigned i = lane; i < 512; i += 32) shared[i] = a[i];
  for (unsigned i = lane; i < 256; i += 32) shared[512 + i] = b[i];
  warp_sync();
  unsigned a_fragment[4], b_fragment[2];
  float sum[4] = {0, 0, 0, 0};
  load_matrix_x4(a_fragment, shared + lane % 16 * 32 + lane / 16 * 16);
  load_matrix_x2(b_fragment, shared + 512 + lane % 8 * 32 + lane / 8 % 2 * 16);
  if (type == 10) mma_f16(sum, a_fragment, b_fragment);
  if (type == 16) mma_bf16(sum, a_fragment, b_fragment);
  if (type == 17) mma_e4m3(sum, a_fragment, b_fragment);
  for (unsigned i = 0; i < 4; ++i) d[(lane / 4 + 8 * (i / 2)) * 8 + lane % 4 * 2 + i % 2] = sum[i];
}

// in [32] through every warp collective: [6, 32].
__global__ void collectives(const float* in, float* out) {
  wait_for_previous_kernel();
  const int lane = static_cast<int>(threadIdx.x);
  const float x = in[lane];
  out[lane] = shuffle(x, 5);
  out[32 + lane] = shuffle_xor(x, 3);
  out[64 + lane] = shuffle_up(x, 2);
  out[96 + lane] = static_cast<float>(warp_ballot(x > 15) >> 16);
  out[128 + lane] = static_cast<float>(warp_max(static_cast<unsigned>(x)) - warp_min(static_cast<unsigned>(x)));
  out[160 + lane] = static_cast<float>(warp_sum(static_cast<unsigned>(x)));
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

int probe_reverse(const float* in, float* out, int blocks, int threads, int barrier) {
  return launch(reverse, {static_cast<unsigned>(blocks), static_cast<unsigned>(threads), threads * 4u, nullptr}, in,
                out, barrier);
}
int probe_copies(const float* in, float* out, int committed, int waited, int offset) {
  return launch(copies, {1, 32, 512, nullptr}, in, out, committed, waited, offset);
}
int probe_named_barriers(float* out) { return launch(named_barriers, {1, 128, 512, nullptr}, out); }
int probe_product(const unsigned char* a, const unsigned char* b, float* d, int type) {
  return launch(product, {1, 32, 768, nullptr}, a, b, d, type);
}
int probe_collectives(const float* in, float* out) { return launch(collectives, {1, 32, 0, nullptr}, in, out); }
}
