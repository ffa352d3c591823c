// FP8CacheWrite in place. The new tokens of a row b and head j lie together in the update and, from position
// write_index[b] on, in the cache: they are one span. grid.y is the pair (b, j), a thread converts 8 elements of the
// span, so reads are of 16 bytes; whether they land in the cache is one comparison.
#include "plugins/cuda/check.h"
#include "plugins/cuda/device.cuh"

namespace glm {
namespace {

constexpr int kVector = 8;
constexpr unsigned kThreads = 128;

template <class T>
__device__ __forceinline__ void load_vector(const T* from, float (&x)[kVector]) {
  constexpr int kPerLoad = 16 / sizeof(T);
  union {
    uint4 loads[kVector / kPerLoad];
    T elements[kVector];
  } vector;
#pragma unroll
  for (int i = 0; i < kVector / kPerLoad; ++i) vector.loads[i] = load_streaming(from + i * kPerLoad);
#pragma unroll
  for (int i = 0; i < kVector; ++i) x[i] = to_f32(vector.elements[i]);
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    cache_write_kernel(e4m3* cache_BJCA, const T* update_BJSA, const int32_t* write_index_B, int J, int C, int S,
                       int A) {
  wait_for_previous_kernel();
  start_next_kernel();
  const int64_t in_span = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * kVector;
  if (in_span >= int64_t{S} * A) return;
  const int64_t in_cache = int64_t{write_index_B[blockIdx.y / J]} * A + in_span;
  if (in_cache < 0 || in_cache >= int64_t{C} * A) return;
  float x[kVector];
  load_vector(update_BJSA + int64_t{blockIdx.y} * S * A + in_span, x);
  const uint2 packed =
      make_uint2(round_to_e4m3x2(x[0], x[1]) | static_cast<unsigned>(round_to_e4m3x2(x[2], x[3])) << 16,
                 round_to_e4m3x2(x[4], x[5]) | static_cast<unsigned>(round_to_e4m3x2(x[6], x[7])) << 16);
  *reinterpret_cast<uint2*>(cache_BJCA + int64_t{blockIdx.y} * C * A + in_cache) = packed;
}

template <class T>
int start(void* cache, const void* update, const int32_t* write_index, int B, int J, int C, int S, int A,
          void* stream) {
  const int64_t vectors = int64_t{S} * A / kVector;
  const dim3 grid(static_cast<unsigned>((vectors + kThreads - 1) / kThreads), static_cast<unsigned>(B * J));
  return launch(cache_write_kernel<T>, {grid, kThreads, 0, stream}, static_cast<e4m3*>(cache),
                static_cast<const T*>(update), write_index, J, C, S, A);
}

}  // namespace
}  // namespace glm

extern "C" int32_t glm_cuda_fp8_cache_write(void* cache, const void* update, const int32_t* write_index, int32_t B,
                                            int32_t J, int32_t C, int32_t S, int32_t A, int32_t update_type,
                                            void* stream) {
  using glm::Argument;
  using glm::Fault;
  glm::Check check;
  check.range(Argument::B, B, 0, 65535);
  check.range(Argument::J, J, 1, 65535);
  check.range(Argument::J, int64_t{B} * J, 0, 65535);  // grid.y
  check.range(Argument::C, C, 1, INT32_MAX);
  check.range(Argument::S, S, 0, INT32_MAX);
  check.range(Argument::A, A, 1, 512);
  check.multiple(Argument::A, A, glm::kVector);
  check.that(update_type == GLM_CUDA_F32 || update_type == GLM_CUDA_BF16 || update_type == GLM_CUDA_F16,
             Argument::update_type, Fault::unsupported);
  if (check.code() == 0 && (B == 0 || S == 0)) return 0;
  check.pointer(Argument::cache, cache, 8);
  check.pointer(Argument::update, update, 16);
  check.pointer(Argument::write_index, write_index, 4);
  if (check.code() != 0) return check.code();
  const auto start = update_type == GLM_CUDA_F32    ? glm::start<float>
                     : update_type == GLM_CUDA_BF16 ? glm::start<glm::bf16>
                                                    : glm::start<glm::f16>;
  return start(cache, update, write_index, B, J, C, S, A, stream);
}
