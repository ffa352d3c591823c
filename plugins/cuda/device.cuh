// Everything in the kernels that is not plain C++, behind one name each: warp and block collectives, asynchronous
// copies, matrix instructions, conversions, launching. Kernels include this file and no CUDA header, so that the same
// source runs in the tests' emulator, which defines the same names once more (GLM_EMULATE).
//
// What holds for every kernel:
//   - its first statement is wait_for_previous_kernel(), as launches overlap with the kernel before them (SM90 and
//     later); or says why not;
//   - shared memory is dynamic, got from shared_memory(), and of unknown content at first;
//   - warp collectives are called by all 32 threads of a warp;
//   - the launcher is started with launch(), which returns 0 or an error code of launch.h.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef GLM_EMULATE

#include "emulated_device.h"

#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime_api.h>

namespace glm {

// Element types as bits; arithmetic is done in float.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};
struct e4m3 {
  uint8_t bits;
};

__device__ __forceinline__ float to_f32(float x) { return x; }
__device__ __forceinline__ float to_f32(bf16 x) { return __bfloat162float(__ushort_as_bfloat16(x.bits)); }
__device__ __forceinline__ float to_f32(f16 x) { return __half2float(__ushort_as_half(x.bits)); }

// Rounds to nearest even; E4M3 saturates at +-448, f16 becomes infinite.
template <class T>
__device__ __forceinline__ T round_to(float x);
template <>
__device__ __forceinline__ float round_to<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ bf16 round_to<bf16>(float x) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
}
template <>
__device__ __forceinline__ f16 round_to<f16>(float x) {
  return {__half_as_ushort(__float2half_rn(x))};
}
template <>
__device__ __forceinline__ e4m3 round_to<e4m3>(float x) {
  return {__nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3)};
}

// Two numbers as E4M3, the first in the low byte. One instruction from SM89 on.
__device__ __forceinline__ uint16_t round_to_e4m3x2(float first, float second) {
  return __nv_cvt_float2_to_fp8x2(make_float2(first, second), __NV_SATFINITE, __NV_E4M3);
}

// Two E4M3 numbers as f16, the first in the low half. Exact. One instruction from SM89 on.
__device__ __forceinline__ unsigned e4m3x2_to_f16x2(uint16_t x) {
#if __CUDA_ARCH__ >= 890
  const __half2_raw pair = __nv_cvt_fp8x2_to_halfraw2(x, __NV_E4M3);
  return static_cast<unsigned>(pair.x) | static_cast<unsigned>(pair.y) << 16;
#else
  // With its bits at the top of f16's exponent and fraction, a number is 2^-8 of itself, also a subnormal one; what is
  // above the greatest then, 448, was a NaN.
  const unsigned wide = __byte_perm(x, 0, 0x1404);  // a byte at the top of each half
  const unsigned bits = (wide & 0x80008000u) | (wide >> 1 & 0x3f803f80u);
  const __half2 value = __hmul2(*reinterpret_cast<const __half2*>(&bits), __float2half2_rn(256.0f));
  return *reinterpret_cast<const unsigned*>(&value) | __hgt2_mask(__habs2(value), __float2half2_rn(448.0f));
#endif
}

__device__ __forceinline__ unsigned bits_of(float x) { return __float_as_uint(x); }
__device__ __forceinline__ float float_of(unsigned bits) { return __uint_as_float(bits); }

// What earlier kernels of the stream wrote is visible afterwards, and what they read may be overwritten.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The next kernel's blocks may be started as soon as all blocks have called this or ended; it still waits for the end
// of this kernel before it touches memory.
__device__ __forceinline__ void start_next_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// The block's shared memory, aligned to 1024 bytes.
__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ __align__(1024) unsigned char glm_shared_memory[];
  return glm_shared_memory;
}

__device__ __forceinline__ void block_sync() { __syncthreads(); }

// A barrier among `threads` threads (whole warps) of the block; `id` is 1 to 15, 0 being block_sync()'s.
__device__ __forceinline__ void block_sync(int id, int threads) {
  asm volatile("barrier.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

__device__ __forceinline__ void warp_sync() { __syncwarp(); }

constexpr unsigned kFullWarp = 0xffffffffu;

template <class T>
__device__ __forceinline__ T shuffle(T value, int lane) {
  return __shfl_sync(kFullWarp, value, lane);
}
template <class T>
__device__ __forceinline__ T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(kFullWarp, value, mask);
}
// From the lane `delta` below; lanes below `delta` keep their own value.
template <class T>
__device__ __forceinline__ T shuffle_up(T value, int delta) {
  return __shfl_up_sync(kFullWarp, value, delta);
}

__device__ __forceinline__ unsigned warp_ballot(bool vote) { return __ballot_sync(kFullWarp, vote); }
__device__ __forceinline__ unsigned warp_max(unsigned value) { return __reduce_max_sync(kFullWarp, value); }
__device__ __forceinline__ unsigned warp_min(unsigned value) { return __reduce_min_sync(kFullWarp, value); }
__device__ __forceinline__ unsigned warp_sum(unsigned value) { return __reduce_add_sync(kFullWarp, value); }

// The lanes whose value is the same as this one's.
__device__ __forceinline__ unsigned match_any(unsigned value) { return __match_any_sync(kFullWarp, value); }
__device__ __forceinline__ int popcount(unsigned bits) { return __popc(bits); }

// 16 bytes that are read once, by this thread only, and written by no running kernel: kept out of the first-level
// cache.
__device__ __forceinline__ uint4 load_streaming(const void* global) {
  uint4 value;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(global));
  return value;
}

__device__ __forceinline__ unsigned shared_address(const void* shared) {
  return static_cast<unsigned>(__cvta_generic_to_shared(shared));
}

// Starts to copy 16 bytes (both aligned to 16) past the first-level cache; where not `valid`, 16 zeros without a read.
// There for this thread after copy_async_wait, for the others after a barrier behind that.
__device__ __forceinline__ void copy_async_16(void* shared, const void* global, bool valid = true) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(valid ? 16 : 0)
               : "memory");
}
// Closes a group of the copies that this thread has started.
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most `pending` of this thread's groups are not complete.
template <int pending>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// Four 8x8 matrices of 16-bit elements: lane l gives the address (aligned to 16) of row l % 8 of matrix l / 8, and gets
// from each matrix the two elements 2 (l % 4) and 2 (l % 4) + 1 of row l / 4.
__device__ __forceinline__ void load_matrix_x4(unsigned (&matrix)[4], const void* shared_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(matrix[0]), "=r"(matrix[1]), "=r"(matrix[2]), "=r"(matrix[3])
               : "r"(shared_address(shared_row))
               : "memory");
}
// Two of them; the addresses of lanes 16 to 31 do not matter.
__device__ __forceinline__ void load_matrix_x2(unsigned (&matrix)[2], const void* shared_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(matrix[0]), "=r"(matrix[1])
               : "r"(shared_address(shared_row))
               : "memory");
}

// d [16, 8] += a [16, 16] b [16, 8] with a row by row and b column by column.
__device__ __forceinline__ void mma_bf16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ void mma_f16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ / 10 == 89 || __CUDA_ARCH__ >= 1200
constexpr bool kHasE4m3Mma = true;
#else  // SM90 and SM100 know the instruction, but it becomes conversions to f16 there
constexpr bool kHasE4m3Mma = false;
#endif
// d [16, 8] += a [16, 32] b [32, 8] in E4M3, where kHasE4m3Mma; elsewhere it ends the kernel with an error.
__device__ __forceinline__ void mma_e4m3(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  if constexpr (kHasE4m3Mma) {
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    __trap();
  }
}

// Warpgroups: four warps that multiply together, from shared memory, while they may do something else. SM90 alone has
// them; elsewhere these end the kernel with an error.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
constexpr bool kHasWarpgroups = true;
#define GLM_SM90(...) asm volatile(__VA_ARGS__)
#else
constexpr bool kHasWarpgroups = false;
#define GLM_SM90(...) __trap()
#endif

// A barrier in shared memory for which nobody has to stop to arrive. Its phases alternate between parity 0 and 1.
struct Barrier {
  uint64_t state;
};
// `arrivals` end a phase. By one thread, with a block_sync() behind it.
__device__ __forceinline__ void barrier_init(Barrier* barrier, unsigned arrivals) {
  GLM_SM90("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void barrier_arrive(Barrier* barrier) {
  GLM_SM90("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// Waits for the end of the current phase if that has this parity; does not wait if it has the other.
__device__ __forceinline__ void barrier_wait(Barrier* barrier, unsigned parity) {
  GLM_SM90(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(parity) : "memory");
}

// What this thread wrote to shared memory, copies it waited for included, is there for warpgroup products that start
// behind a later barrier.
__device__ __forceinline__ void fence_for_products() { GLM_SM90("fence.proxy.async.shared::cta;" :: : "memory"); }

// Registers of each thread of the calling warpgroup from here on.
template <int count>
__device__ __forceinline__ void fewer_registers() {
  GLM_SM90("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(count));
}
template <int count>
__device__ __forceinline__ void more_registers() {
  GLM_SM90("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(count));
}

// Rows of 128 bytes, one behind the other from a multiple of 1024 on, whose 16-byte vector v is at place v ^ (row % 8):
// the operand that begins with the 32 bytes from `first` on in each of them.
__device__ __forceinline__ uint64_t product_operand(const void* first) {
  constexpr uint64_t kRowsOf8 = 1024, kSwizzle128 = 1;
  return (shared_address(first) & 0x3ffffu) >> 4 | uint64_t{1} << 16 | kRowsOf8 >> 4 << 32 | kSwizzle128 << 62;
}

#define GLM_8(list, i) \
  list(i), list(i + 1), list(i + 2), list(i + 3), list(i + 4), list(i + 5), list(i + 6), list(i + 7)
#define GLM_64(list)                                                                                                   \
  GLM_8(list, 0), GLM_8(list, 8), GLM_8(list, 16), GLM_8(list, 24), GLM_8(list, 32), GLM_8(list, 40), GLM_8(list, 48), \
      GLM_8(list, 56)
#define GLM_SUM(i) "+f"(d[i])
#define GLM_SUMS                                                                                                    \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
  "%24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, "  \
  "%46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}"
#define GLM_PRODUCT(shape_and_types, last)                                                  \
  GLM_SM90(                                                                                 \
      "{\n"                                                                                 \
      ".reg .pred add;\n"                                                                   \
      "setp.ne.b32 add, %66, 0;\n"                                                          \
      "wgmma.mma_async.sync.aligned." shape_and_types " " GLM_SUMS ", %64, %65, add, " last \
      ";\n"                                                                                 \
      "}" : GLM_64(GLM_SUM) : "l"(a),                                                       \
      "l"(b), "r"(static_cast<int>(add)))

// d [64, 128] = a [64, 32 bytes] b [128, 32 bytes]^T, added to d where `add`. Thread t of the warpgroup has rows
// 16 (t / 32) + t % 32 / 4 and the 8th one below; d[4 j + 2 r + i] is row r of the two, column 8 j + 2 (t % 4) + i.
// d is not there, and the operands must stay, until product_wait().
__device__ __forceinline__ void product_64x128(bf16, float (&d)[64], uint64_t a, uint64_t b, bool add) {
  GLM_PRODUCT("m64n128k16.f32.bf16.bf16", "1, 1, 0, 0");
}
__device__ __forceinline__ void product_64x128(f16, float (&d)[64], uint64_t a, uint64_t b, bool add) {
  GLM_PRODUCT("m64n128k16.f32.f16.f16", "1, 1, 0, 0");
}
__device__ __forceinline__ void product_64x128(e4m3, float (&d)[64], uint64_t a, uint64_t b, bool add) {
  GLM_PRODUCT("m64n128k32.f32.e4m3.e4m3", "1, 1");
}
// Before the first product, and before one whose d others than products have written.
__device__ __forceinline__ void product_begin() { GLM_SM90("wgmma.fence.sync.aligned;" :: : "memory"); }
// Waits for all products of the warpgroup, of which d is one's.
__device__ __forceinline__ void product_wait(float (&d)[64]) {
  GLM_SM90(
      "wgmma.commit_group.sync.aligned;\n"
      "wgmma.wait_group.sync.aligned 0;" : GLM_64(GLM_SUM) : : "memory");
}

#undef GLM_8
#undef GLM_64
#undef GLM_SUM
#undef GLM_SUMS
#undef GLM_PRODUCT
#undef GLM_SM90

// The host's side.

constexpr int kRuntimeError = 1 << 16;  // plus the CUDA runtime's own code
const char* runtime_error_text(int code);

inline int error_code(cudaError_t error) { return error == cudaSuccess ? 0 : kRuntimeError + static_cast<int>(error); }

// What launchers choose by. Reading it is allowed while a graph is captured.
struct Device {
  int sm = 0;               // 90 is compute capability 9.0
  int multiprocessors = 0;  // SMs
  int shared_bytes = 0;     // most that a block can have
};

inline int current_device(Device& device) {
  int index = 0, major = 0, minor = 0;
  cudaError_t error = cudaGetDevice(&index);
  const auto read = [&](int& value, cudaDeviceAttr attribute) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&value, attribute, index);
  };
  read(major, cudaDevAttrComputeCapabilityMajor);
  read(minor, cudaDevAttrComputeCapabilityMinor);
  read(device.multiprocessors, cudaDevAttrMultiProcessorCount);
  read(device.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  device.sm = major * 10 + minor;
  return error_code(error);
}

struct Launch {
  dim3 grid;
  unsigned threads;
  size_t shared_bytes;
  void* stream;
};

// Starts a kernel; every kernel here may overlap with the one before it (wait_for_previous_kernel()).
template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), const Launch& what, Arguments... arguments) {
  Device device;
  if (const int code = current_device(device)) return code;
  if (what.shared_bytes > 48 * 1024) {  // what a kernel may have without asking
    const auto error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(what.shared_bytes));
    if (error != cudaSuccess) {
      cudaGetLastError();  // no later call of anybody else is to find it
      return error_code(error);
    }
  }
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = what.grid;
  config.blockDim = dim3(what.threads);
  config.dynamicSmemBytes = what.shared_bytes;
  config.stream = static_cast<cudaStream_t>(what.stream);
  config.attrs = &overlap;
  config.numAttrs = device.sm >= 90 ? 1 : 0;
  const auto error = cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
  if (error != cudaSuccess) cudaGetLastError();
  return error_code(error);
}

}  // namespace glm

#endif
