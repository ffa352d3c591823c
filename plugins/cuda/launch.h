// The C interface of libglm_cuda.so: one function per op that puts the op's work on a stream.
//
// All of them: pointers are device memory, sizes are 32-bit and positive unless said otherwise (T = 0 does nothing),
// `stream` is a cudaStream_t. No function allocates, waits for the device or depends on values in device memory, so
// that a CUDA graph can hold every call (make one before capturing: a kernel is loaded by its first launch). The device
// is the current one of the calling thread.
//
// The result is 0, or a code that glm_cuda_error() puts into words: which argument is wrong and how, or what the CUDA
// runtime reported.
//
// Letters: T tokens, D hidden, F expert width, E experts, K chosen, G groups, B batch, S new tokens, J key/value heads,
// C cache capacity, A head size.
#pragma once

#include <stdint.h>

#if defined(__GNUC__)
#define GLM_CUDA_API __attribute__((visibility("default")))
#else
#define GLM_CUDA_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

// Counts up with every change of a signature or a workspace size below; a caller compares it with glm_cuda_abi().
#define GLM_CUDA_ABI 1

// Element types, by their ONNX numbers.
enum { GLM_CUDA_F32 = 1, GLM_CUDA_F16 = 10, GLM_CUDA_BF16 = 16, GLM_CUDA_E4M3 = 17 };

GLM_CUDA_API int32_t glm_cuda_abi(void);

// How the experts' products are computed: what suits the sizes and the device, or one kernel whatever they are. WGMMA
// is SM90's alone.
enum { GLM_CUDA_PATH_AUTO = 0, GLM_CUDA_PATH_DECODE = 1, GLM_CUDA_PATH_MMA = 2, GLM_CUDA_PATH_WGMMA = 3 };

// A code as a sentence. Valid until the thread's next call.
GLM_CUDA_API const char* glm_cuda_error(int32_t code);

// The op MoERouter, float32 throughout. One launch.
//   E up to 512; top_k (K) up to 32 and E; n_group (G) up to 32, divides E; topk_group up to n_group;
//   norm_topk_prob 0 or 1.
GLM_CUDA_API int32_t glm_cuda_moe_router(const float* logits,           // [T, E]
                                         const float* correction_bias,  // [E]
                                         int32_t* expert_ids,           // [T, K]
                                         float* expert_weights,         // [T, K]
                                         int32_t T, int32_t E, int32_t top_k, int32_t n_group, int32_t topk_group,
                                         int32_t norm_topk_prob, float routed_scaling_factor, void* stream);

// The ops MoEExperts (weights in the type of hidden, scales null) and FP8MoEExperts (weights E4M3, scales per row).
//   weight_type is E4M3, and hidden_type F32, BF16 or F16; or both are BF16 or both F16. D and F are multiples of 16
//   up to 65536, E up to 512, K up to 32 and E. Weights, hidden and out begin at multiples of 16 bytes, the workspace
//   at one of 256. An expert id outside 0 .. E - 1 makes its token's output NaN. `path` is GLM_CUDA_PATH_AUTO: the
//   others are for tests and measurements.
GLM_CUDA_API int32_t glm_cuda_moe_experts(const void* hidden,           // [T, D]
                                          const int32_t* expert_ids,    // [T, K], distinct within a token
                                          const float* expert_weights,  // [T, K]
                                          const void* gate_up,          // [E, 2F, D], gate rows first
                                          const float* gate_up_scale,   // [E, 2F], null unless E4M3
                                          const void* down,             // [E, D, F]
                                          const float* down_scale,      // [E, D], null unless E4M3
                                          void* out,                    // [T, D]
                                          void* workspace, int64_t workspace_bytes, int32_t T, int32_t D, int32_t F,
                                          int32_t E, int32_t K, int32_t hidden_type, int32_t weight_type, int32_t path,
                                          void* stream);

// Bytes that glm_cuda_moe_experts() needs for these sizes or smaller T, on any device; a negative number is an error
// code with its sign changed.
GLM_CUDA_API int64_t glm_cuda_moe_experts_workspace(int32_t T, int32_t D, int32_t F, int32_t E, int32_t K,
                                                    int32_t hidden_type, int32_t weight_type);

// The op FP8CacheWrite, in place: rows write_index[b] .. write_index[b] + S - 1 of the cache become the update,
// saturated to +-448 and rounded to E4M3; rows outside 0 .. C - 1 are left out. B and S may be 0.
//   A is a multiple of 8 up to 512, B * J at most 65535, update_type F32, BF16 or F16; update begins at a multiple of
//   16 bytes, cache of 8.
GLM_CUDA_API int32_t glm_cuda_fp8_cache_write(void* cache,                 // [B, J, C, A] E4M3
                                              const void* update,          // [B, J, S, A]
                                              const int32_t* write_index,  // [B]
                                              int32_t B, int32_t J, int32_t C, int32_t S, int32_t A,
                                              int32_t update_type, void* stream);

#ifdef __cplusplus
}
#endif
