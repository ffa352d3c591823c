// The names of plugins/cuda/device.cuh once more, on the emulator.
//
// The layouts of matrix fragments are those of the PTX ISA (9.2, "Matrix Fragments for mma.m16n8k16 with floating point
// type", "... mma.m16n8k32", "Warp-level matrix load instruction: ldmatrix"). Conversions are written from the formats'
// definitions and share nothing with the kernels of this project.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <vector>

#include "emulated_numbers.h"
#include "emulator.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

using std::max;
using std::min;

namespace glm {

inline void wait_for_previous_kernel() { emulator::waited_for_previous_kernel(); }
inline void start_next_kernel() {}

inline unsigned char* shared_memory() { return emulator::shared_memory(); }
inline void block_sync() { emulator::barrier(0, blockDim.x); }
inline void block_sync(int id, int threads) { emulator::barrier(id, static_cast<unsigned>(threads)); }
inline void warp_sync() { emulator::warp("warp_sync", nullptr, nullptr); }

namespace emulator {

// Every lane brings a value and gets what `result` makes of those of all and its own number.
template <class T, class Result>
T exchange(const char* what, T value, Result result) {
  struct Lane {
    T value, out;
    const Result* result;
  } mine{value, {}, &result};
  warp(what, &mine, [](void* const* all) {
    T values[32];
    for (int lane = 0; lane < 32; ++lane) values[lane] = static_cast<Lane*>(all[lane])->value;
    for (int lane = 0; lane < 32; ++lane) {
      auto* to = static_cast<Lane*>(all[lane]);
      to->out = (*to->result)(values, lane);
    }
  });
  return mine.out;
}

}  // namespace emulator

template <class T>
T shuffle(T value, int lane) {
  return emulator::exchange("shuffle", value, [lane](const T* all, int) { return all[lane & 31]; });
}
template <class T>
T shuffle_xor(T value, int mask) {
  return emulator::exchange("shuffle_xor", value, [mask](const T* all, int me) { return all[(me ^ mask) & 31]; });
}
template <class T>
T shuffle_up(T value, int delta) {
  return emulator::exchange("shuffle_up", value,
                            [delta](const T* all, int me) { return all[me < delta ? me : me - delta]; });
}
inline unsigned warp_ballot(bool vote) {
  return emulator::exchange("warp_ballot", static_cast<unsigned>(vote), [](const unsigned* all, int) {
    unsigned mask = 0;
    for (int lane = 0; lane < 32; ++lane) mask |= all[lane] << lane;
    return mask;
  });
}
inline unsigned warp_max(unsigned value) {
  return emulator::exchange("warp_max", value,
                            [](const unsigned* all, int) { return *std::max_element(all, all + 32); });
}
inline unsigned warp_min(unsigned value) {
  return emulator::exchange("warp_min", value,
                            [](const unsigned* all, int) { return *std::min_element(all, all + 32); });
}
inline unsigned warp_sum(unsigned value) {
  return emulator::exchange("warp_sum", value, [](const unsigned* all, int) {
    unsigned sum = 0;
    for (int lane = 0; lane < 32; ++lane) sum += all[lane];
    return sum;
  });
}

inline unsigned match_any(unsigned value) {
  return emulator::exchange("match_any", value, [](const unsigned* all, int me) {
    unsigned mask = 0;
    for (int lane = 0; lane < 32; ++lane) mask |= static_cast<unsigned>(all[lane] == all[me]) << lane;
    return mask;
  });
}
inline int popcount(unsigned bits) { return __builtin_popcount(bits); }

inline uint4 load_streaming(const void* global) { return *static_cast<const uint4*>(global); }

namespace emulator {

// Which copies warpgroup products may read: those that were waited for before their thread's last fence. Counted in
// groups of a thread, since the process began.
struct CopyState {
  unsigned committed[1024], arrived[1024], fenced[1024];
  struct {
    unsigned thread, group;
  } copied[256 * 1024 / 16];  // by 16 bytes of shared memory
};
inline CopyState copy_state;

}  // namespace emulator

inline void copy_async_16(void* shared, const void* global, bool valid = true) {
  emulator::copy_async(shared, global, valid);
  emulator::copy_state.copied[(static_cast<unsigned char*>(shared) - shared_memory()) / 16] = {
      threadIdx.x, emulator::copy_state.committed[threadIdx.x] + 1};
}
inline void copy_async_commit() {
  emulator::copy_async_commit();
  ++emulator::copy_state.committed[threadIdx.x];
}
template <int pending>
void copy_async_wait() {
  emulator::copy_async_wait(pending);
  const unsigned committed = emulator::copy_state.committed[threadIdx.x];
  unsigned& arrived = emulator::copy_state.arrived[threadIdx.x];
  if (committed > pending) arrived = std::max(arrived, committed - pending);
}

namespace emulator {

template <int count>
void load_matrix(const char* what, unsigned (&matrix)[count], const void* shared_row) {
  struct Lane {
    const void* row;
    unsigned* out;
    const char* what;
  } mine{shared_row, matrix, what};
  warp(what, &mine, [](void* const* all) {
    for (int m = 0; m < count; ++m) {
      for (int row = 0; row < 8; ++row) {
        const auto* from = static_cast<Lane*>(all[8 * m + row]);
        expect_shared(from->what, from->row, 16, 16);
        const auto* pairs = static_cast<const unsigned*>(from->row);
        for (int column = 0; column < 4; ++column) static_cast<Lane*>(all[4 * row + column])->out[m] = pairs[column];
      }
    }
  });
}

// d [16, 8] += a [16, K] b [K, 8], where a register holds `4 / sizeof(T)` elements of K. Summed in double: the order
// and the inner precision of tensor cores are not documented.
template <class T>
void mma(const char* what, float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  constexpr int kPerRegister = 4 / sizeof(T), kHalf = 4 * kPerRegister, K = 2 * kHalf;
  struct Lane {
    float* d;
    const unsigned *a, *b;
  } mine{d, a, b};
  warp(what, &mine, [](void* const* all) {
    float A[16][K], B[K][8];
    for (int lane = 0; lane < 32; ++lane) {
      const int group = lane >> 2, in_group = lane % 4;
      const auto* from = static_cast<Lane*>(all[lane]);
      T elements[kPerRegister];
      for (int r = 0; r < 4; ++r) {  // rows group and group + 8 of the first half of K, then of the second
        std::memcpy(elements, &from->a[r], 4);
        for (int i = 0; i < kPerRegister; ++i) {
          A[group + 8 * (r % 2)][in_group * kPerRegister + i + kHalf * (r / 2)] = to_f32(elements[i]);
        }
      }
      for (int r = 0; r < 2; ++r) {
        std::memcpy(elements, &from->b[r], 4);
        for (int i = 0; i < kPerRegister; ++i) B[in_group * kPerRegister + i + kHalf * r][group] = to_f32(elements[i]);
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      float* out = static_cast<Lane*>(all[lane])->d;
      for (int i = 0; i < 4; ++i) {
        const int row = (lane >> 2) + 8 * (i / 2), column = lane % 4 * 2 + i % 2;
        double sum = out[i];
        for (int k = 0; k < K; ++k) sum += static_cast<double>(A[row][k]) * B[k][column];
        out[i] = static_cast<float>(sum);
      }
    }
  });
}

}  // namespace emulator

inline void load_matrix_x4(unsigned (&matrix)[4], const void* shared_row) {
  emulator::load_matrix("load_matrix_x4", matrix, shared_row);
}
inline void load_matrix_x2(unsigned (&matrix)[2], const void* shared_row) {
  emulator::load_matrix("load_matrix_x2", matrix, shared_row);
}
inline void mma_bf16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  emulator::mma<bf16>("mma_bf16", d, a, b);
}
inline void mma_f16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  emulator::mma<f16>("mma_f16", d, a, b);
}
constexpr bool kHasE4m3Mma = true;
inline void mma_e4m3(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  emulator::mma<e4m3>("mma_e4m3", d, a, b);
}

constexpr bool kHasWarpgroups = true;

struct Barrier {
  uint16_t arrivals, missing;
  uint32_t phase;
};
inline void barrier_init(Barrier* barrier, unsigned arrivals) {
  emulator::expect_shared("barrier_init", barrier, 8, 8);
  *barrier = {static_cast<uint16_t>(arrivals), static_cast<uint16_t>(arrivals), 0};
}
inline void barrier_arrive(Barrier* barrier) {
  emulator::expect_shared("barrier_arrive", barrier, 8, 8);
  if (--barrier->missing == 0) {
    barrier->missing = barrier->arrivals;
    ++barrier->phase;
  }
}
inline void barrier_wait(Barrier* barrier, unsigned parity) {
  struct State {
    const Barrier* barrier;
    unsigned parity;
  } state{barrier, parity};
  const auto ready = [](const void* of) {
    const auto* s = static_cast<const State*>(of);
    return s->barrier->phase % 2 != s->parity;
  };
  emulator::wait_until("barrier_wait", ready, &state);
}
inline void fence_for_products() {
  emulator::copy_state.fenced[threadIdx.x] = emulator::copy_state.arrived[threadIdx.x];
}
template <int count>
void fewer_registers() {
  emulator::warpgroup("fewer_registers", nullptr, nullptr);
}
template <int count>
void more_registers() {
  emulator::warpgroup("more_registers", nullptr, nullptr);
}

// PTX ISA 9.7.15.5.1, "Matrix Descriptor Format": address, leading and stride byte offset in units of 16 bytes,
// swizzle.
inline uint64_t product_operand(const void* first) {
  emulator::expect_shared("product_operand", first, 32, 32);
  const auto address = static_cast<uint64_t>(static_cast<const unsigned char*>(first) - shared_memory());
  return address >> 4 | uint64_t{1} << 16 | uint64_t{1024 / 16} << 32 | uint64_t{1} << 62;
}

namespace emulator {

// Products of a warpgroup that are under way: they read shared memory, and write d, when somebody waits for them.
struct PendingProduct {
  float* d[128];
  uint64_t a, b;
  bool add;
  void (*run)(const PendingProduct&);
};
inline std::vector<PendingProduct> pending_products[8];
inline const bool kStartsWithoutProducts = [] {
  at_block_start([] {
    for (auto& pending : pending_products) pending.clear();
  });
  return true;
}();

// Row `row` of an operand of 32 bytes per row: rows lie 128 bytes apart, groups of 8 by the stride; then the 128-byte
// swizzle flips bits 4 to 6 of the address by bits 7 to 9.
template <class T>
void operand_row(uint64_t descriptor, int row, float (&to)[32 / sizeof(T)]) {
  if (descriptor >> 62 != 1) fail("only the 128-byte swizzle is known");
  const uint64_t start = (descriptor & 0x3fff) << 4, stride = (descriptor >> 32 & 0x3fff) << 4;
  for (unsigned i = 0; i < 32 / sizeof(T); ++i) {
    uint64_t at = start + row / 8 * stride + row % 8 * 128 + i * sizeof(T);
    at ^= (at >> 7 & 7) << 4;
    const unsigned char* from = shared_memory() + at;
    expect_shared("product", from, sizeof(T), sizeof(T));
    const auto& copied = copy_state.copied[at / 16];
    if (copied.group > copy_state.fenced[copied.thread]) fail("a product reads a copy without fence_for_products()");
    T element;
    std::memcpy(&element, from, sizeof(T));
    to[i] = to_f32(element);
  }
}

template <class T>
void run_product(const PendingProduct& product) {
  constexpr int K = 32 / sizeof(T);
  static float A[64][K], B[128][K];
  for (int row = 0; row < 64; ++row) operand_row<T>(product.a, row, A[row]);
  for (int row = 0; row < 128; ++row) operand_row<T>(product.b, row, B[row]);
  for (int thread = 0; thread < 128; ++thread) {
    for (int i = 0; i < 64; ++i) {
      const int row = thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + thread % 4 * 2 + i % 2;
      double sum = product.add ? product.d[thread][i] : 0.0;
      for (int k = 0; k < K; ++k) sum += static_cast<double>(A[row][k]) * B[column][k];
      product.d[thread][i] = static_cast<float>(sum);
    }
  }
}

struct ProductOfThread {
  PendingProduct product;
  unsigned warpgroup;
};

template <class T>
void product_64x128(const char* what, float (&d)[64], uint64_t a, uint64_t b, bool add) {
  ProductOfThread mine{{{d}, a, b, add, run_product<T>}, threadIdx.x / 128};
  warpgroup(what, &mine, [](void* const* all) {
    ProductOfThread& first = *static_cast<ProductOfThread*>(all[0]);
    for (int thread = 0; thread < 128; ++thread) {
      const PendingProduct& product = static_cast<ProductOfThread*>(all[thread])->product;
      if (product.a != first.product.a || product.b != first.product.b || product.add != first.product.add) {
        fail("the threads of a warpgroup do not agree on the operands");
      }
      first.product.d[thread] = product.d[0];
    }
    pending_products[first.warpgroup].push_back(first.product);
  });
}

}  // namespace emulator

inline void product_64x128(bf16, float (&d)[64], uint64_t a, uint64_t b, bool add) {
  emulator::product_64x128<bf16>("product_64x128 bf16", d, a, b, add);
}
inline void product_64x128(f16, float (&d)[64], uint64_t a, uint64_t b, bool add) {
  emulator::product_64x128<f16>("product_64x128 f16", d, a, b, add);
}
inline void product_64x128(e4m3, float (&d)[64], uint64_t a, uint64_t b, bool add) {
  emulator::product_64x128<e4m3>("product_64x128 e4m3", d, a, b, add);
}
inline void product_begin() { emulator::warpgroup("product_begin", nullptr, nullptr); }
inline void product_wait(float (&)[64]) {
  unsigned group = threadIdx.x / 128;
  emulator::warpgroup("product_wait", &group, [](void* const* all) {
    auto& pending = emulator::pending_products[*static_cast<unsigned*>(all[0])];
    for (const auto& product : pending) product.run(product);
    pending.clear();
  });
}

// The arguments are copied before the call returns, as those of a launch are.
template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), const Launch& what, Arguments... arguments) {
  const auto call = [=] { kernel(static_cast<Parameters>(arguments)...); };
  const emulator::Thread thread{[](const void* closure) { (*static_cast<const decltype(call)*>(closure))(); }, &call};
  return emulator::run(thread, what);
}

}  // namespace glm
