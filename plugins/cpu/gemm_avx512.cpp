// AVX-512 with BF16 and VBMI. Few activation rows: every weight row is streamed once, and lanes run along it. Many: the
// lanes are 16 tokens and weights are broadcast to them, so no sum is across a vector.
#include <immintrin.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>

#include "plugins/cpu/gemm_inline.h"
#include "plugins/cpu/weights_avx512.h"

namespace glm {
namespace {

constexpr size_t kPrefetchBytes = 2048;  // ahead of a stream of weights

// One weight row times M activation rows: each weight is read and widened once.
template <class W, size_t M>
void dot_few(const uint8_t* row, const void* const* x, size_t width, float* y, size_t stride) {
  // Eight independent sums hide the latency of a product.
  constexpr size_t kVectors = W::kVectors, kUnroll = M * kVectors < 8 ? 8 / (M * kVectors) : 1;
  constexpr size_t kStep = 64 / W::kBytes;  // elements
  const W weights;
  __m512 sum[M][kUnroll * kVectors];
#pragma GCC unroll 8
  for (size_t m = 0; m < M; ++m) {
#pragma GCC unroll 8
    for (size_t i = 0; i < kUnroll * kVectors; ++i) sum[m][i] = _mm512_setzero_ps();
  }
  // Adds the products of a step, `vector` vectors from the start, to its own sums, from `first` on.
  const auto add = [&](const __m512i(&weight)[kVectors], size_t vector, size_t first) {
#pragma GCC unroll 2
    for (size_t v = 0; v < kVectors; ++v) {
#pragma GCC unroll 8
      for (size_t m = 0; m < M; ++m) {
        const __m512i value = _mm512_load_si512(static_cast<const uint8_t*>(x[m]) + (vector + v) * 64);
        sum[m][first + v] = W::multiply_add(sum[m][first + v], weight[v], value);
      }
    }
  };
  size_t k = 0, vector = 0;  // of the weight row, of the packed rows
  for (; k + kUnroll * kStep <= width; k += kUnroll * kStep, vector += kUnroll * kVectors) {
#pragma GCC unroll 8
    for (size_t u = 0; u < kUnroll; ++u) {
      const uint8_t* from = row + (k + u * kStep) * W::kBytes;
      _mm_prefetch(reinterpret_cast<const char*>(from + kPrefetchBytes), _MM_HINT_T0);
      __m512i weight[kVectors];
      weights.widen(read64(from), weight);
      add(weight, vector + u * kVectors, u * kVectors);
    }
  }
  for (; k < width; k += kStep, vector += kVectors) {
    __m512i weight[kVectors];
    read(weights, row + k * W::kBytes, width - k, weight);
    add(weight, vector, 0);
  }
#pragma GCC unroll 8
  for (size_t m = 0; m < M; ++m) {
#pragma GCC unroll 8
    for (size_t i = 1; i < kUnroll * kVectors; ++i) sum[m][0] = _mm512_add_ps(sum[m][0], sum[m][i]);
    y[m * stride] = _mm512_reduce_add_ps(sum[m][0]);
  }
}

constexpr size_t kLanes = 16;                   // tokens of a group
constexpr size_t kPanelRows = 8;                // weight rows that meet a tile at a time
constexpr size_t kMostVectors = 32;             // of a packed row at a time: a panel stays in the first-level cache
constexpr size_t kActivationBytes = 512 << 10;  // at a time: they stay in the second-level cache
// Apart from the numbers, a cache line, so that the rows of a panel do not compete for the same places of the cache.
constexpr size_t kPanelStride = (kMostVectors + 1) * 64;
constexpr size_t kSums = kPanelRows * kLanes;  // of a panel and a group

// Memory of the thread, which only grows; a multiple of 64 bytes.
uint8_t* scratch(size_t bytes) {
  struct Free {
    void operator()(uint8_t* p) const { std::free(p); }
  };
  thread_local std::unique_ptr<uint8_t, Free> memory;
  thread_local size_t size = 0;
  if (bytes > size) {
    size = 0;
    memory.reset(static_cast<uint8_t*>(std::aligned_alloc(64, bytes)));
    if (!memory) throw std::bad_alloc();
    size = bytes;
  }
  return memory.get();
}

// Four rows of 16 numbers, turned in fours: column 4 l + c becomes four lanes of row c, from lane 4 l on.
inline void transpose_fours(__m512i* r) {
  const __m512i low01 = _mm512_unpacklo_epi32(r[0], r[1]), high01 = _mm512_unpackhi_epi32(r[0], r[1]);
  const __m512i low23 = _mm512_unpacklo_epi32(r[2], r[3]), high23 = _mm512_unpackhi_epi32(r[2], r[3]);
  r[0] = _mm512_unpacklo_epi64(low01, low23);
  r[1] = _mm512_unpackhi_epi64(low01, low23);
  r[2] = _mm512_unpacklo_epi64(high01, high23);
  r[3] = _mm512_unpackhi_epi64(high01, high23);
}

// 16 rows of 16 numbers; column 4 l + c goes to `to` + (4 l + c) * stride bytes.
inline void store_transposed(__m512i (&r)[16], uint8_t* to, size_t stride) {
#pragma GCC unroll 4
  for (size_t i = 0; i < 16; i += 4) transpose_fours(r + i);
#pragma GCC unroll 4
  for (size_t c = 0; c < 4; ++c) {
    // Fours 0 and 2, then 1 and 3, of all four.
    const __m512i even01 = _mm512_shuffle_i32x4(r[c], r[4 + c], 0x88),
                  odd01 = _mm512_shuffle_i32x4(r[c], r[4 + c], 0xdd);
    const __m512i even23 = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0x88);
    const __m512i odd23 = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0xdd);
    _mm512_store_si512(to + c * stride, _mm512_shuffle_i32x4(even01, even23, 0x88));
    _mm512_store_si512(to + (4 + c) * stride, _mm512_shuffle_i32x4(odd01, odd23, 0x88));
    _mm512_store_si512(to + (8 + c) * stride, _mm512_shuffle_i32x4(even01, even23, 0xdd));
    _mm512_store_si512(to + (12 + c) * stride, _mm512_shuffle_i32x4(odd01, odd23, 0xdd));
  }
}

// A run of the packed rows' vectors.
struct Depth {
  size_t first, count;
};

// A group's tokens as lanes: number d of the 16 goes to `to` + d * stride bytes. Beyond the last token all are zero.
void pack_group(const void* const* x, size_t tokens, Depth depth, uint8_t* to, size_t stride) {
  for (size_t v = 0; v < depth.count; ++v) {
    __m512i rows[kLanes];
#pragma GCC unroll 16
    for (size_t t = 0; t < kLanes; ++t) {
      rows[t] = t < tokens ? _mm512_load_si512(static_cast<const uint8_t*>(x[t]) + (depth.first + v) * 64)
                           : _mm512_setzero_si512();
    }
    store_transposed(rows, to + v * 16 * stride, stride);
  }
}

// Rows n .. n + 7 of the weights, as vectors. Beyond the last row it is taken again, for sums that are not kept.
template <class W>
void pack_panel(const W& weights, const uint8_t* w, size_t n, size_t rows, size_t width, Depth depth, uint8_t* panel) {
  constexpr size_t kStep = 64 / W::kBytes;
  for (size_t i = 0; i < kPanelRows; ++i) {
    const uint8_t* row = w + std::min(n + i, rows - 1) * width * W::kBytes;
    for (size_t v = 0; v < depth.count; v += W::kVectors) {
      const size_t k = (depth.first + v) / W::kVectors * kStep;
      const uint8_t* from = row + k * W::kBytes;
      _mm_prefetch(reinterpret_cast<const char*>(from + kPanelRows * width * W::kBytes), _MM_HINT_T0);
      __m512i wide[W::kVectors];
      read(weights, from, width - k, wide);
      for (size_t i = 0; i < W::kVectors; ++i) _mm512_store_si512(panel + (v + i) * 64, wide[i]);
    }
    panel += kPanelStride;
  }
}

// A panel times a tile of G groups: 8 G sums stay in registers, a weight is broadcast once for all groups.
template <class W, size_t G>
void multiply_tile(const uint8_t* x,  // [16 count, G, lanes]
                   const uint8_t* panel, size_t count, bool add,
                   float* sums) {  // [G, panel rows, lanes]
  __m512 sum[G][kPanelRows];
#pragma GCC unroll 3
  for (size_t g = 0; g < G; ++g) {
#pragma GCC unroll 8
    for (size_t n = 0; n < kPanelRows; ++n) {
      sum[g][n] = add ? _mm512_load_ps(sums + g * kSums + n * kLanes) : _mm512_setzero_ps();
    }
  }
  for (size_t d = 0; d < 16 * count; ++d, x += G * 64, panel += 4) {
    __m512i value[G];
#pragma GCC unroll 3
    for (size_t g = 0; g < G; ++g) value[g] = _mm512_load_si512(x + g * 64);
#pragma GCC unroll 8
    for (size_t n = 0; n < kPanelRows; ++n) {
      int32_t bits;
      std::memcpy(&bits, panel + n * kPanelStride, 4);
      const __m512i weight = _mm512_set1_epi32(bits);
#pragma GCC unroll 3
      for (size_t g = 0; g < G; ++g) sum[g][n] = W::multiply_add(sum[g][n], value[g], weight);
    }
  }
#pragma GCC unroll 3
  for (size_t g = 0; g < G; ++g) {
#pragma GCC unroll 8
    for (size_t n = 0; n < kPanelRows; ++n) _mm512_store_ps(sums + g * kSums + n * kLanes, sum[g][n]);
  }
}

// The sums of a panel and a group [panel rows, lanes], as `rows` numbers for each of `tokens` tokens.
void store_sums(const float* sums, size_t tokens, size_t rows, float* y, size_t stride) {
  __m512i r[kPanelRows];
#pragma GCC unroll 8
  for (size_t n = 0; n < kPanelRows; ++n) r[n] = _mm512_load_si512(sums + n * kLanes);
  transpose_fours(r);
  transpose_fours(r + 4);
  alignas(64) float turned[kPanelRows][kLanes];
#pragma GCC unroll 8
  for (size_t n = 0; n < kPanelRows; ++n) _mm512_store_si512(turned[n], r[n]);
  for (size_t t = 0; t < tokens; ++t, y += stride) {
    const float *low = turned[t % 4] + t / 4 * 4, *high = turned[4 + t % 4] + t / 4 * 4;
    if (rows == kPanelRows) {
      std::memcpy(y, low, 16);
      std::memcpy(y + 4, high, 16);
    } else {
      std::memcpy(y, low, std::min<size_t>(rows, 4) * 4);
      if (rows > 4) std::memcpy(y + 4, high, (rows - 4) * 4);
    }
  }
}

// How many groups make the next tile: three, but no tile of one where two of two are possible.
inline size_t groups_of_tile(size_t left) { return left == 2 || left == 4 ? 2 : std::min<size_t>(left, 3); }

template <class W>
void multiply_many(const uint8_t* w, size_t rows, const void* const* x, size_t count, size_t width, size_t vectors,
                   float* y, size_t stride) {
  using Tile = void (*)(const uint8_t*, const uint8_t*, size_t, bool, float*);
  static constexpr Tile kTile[] = {multiply_tile<W, 1>, multiply_tile<W, 2>, multiply_tile<W, 3>};
  const W weights;
  const size_t groups = ceil_div(count, kLanes), group_vector = 16 * 64;
  const size_t fit = kActivationBytes / (groups * group_vector) / 2 * 2;
  const size_t most = std::clamp<size_t>(fit, 2, kMostVectors);
  // One block of the depth leaves nothing to be added to: all of its sums have one place.
  const bool whole = vectors <= most;
  const size_t panels = ceil_div(rows, kPanelRows);
  const size_t packed_bytes = groups * std::min(most, vectors) * group_vector;

  uint8_t* packed = scratch(packed_bytes + (whole ? 1 : panels) * groups * kSums * sizeof(float));
  float* const sums = reinterpret_cast<float*>(packed + packed_bytes);
  alignas(64) uint8_t panel[kPanelRows * kPanelStride];

  for (size_t first = 0; first < vectors; first += most) {
    const Depth depth{first, std::min(most, vectors - first)};
    for (size_t g = 0; g < groups;) {
      const size_t taken = groups_of_tile(groups - g);
      uint8_t* tile = packed + g * depth.count * group_vector;
      for (size_t i = 0; i < taken; ++i) {
        const size_t t = (g + i) * kLanes;
        pack_group(x + t, std::min(kLanes, count - t), depth, tile + i * 64, taken * 64);
      }
      g += taken;
    }
    for (size_t n = 0; n < rows; n += kPanelRows) {
      pack_panel(weights, w, n, rows, width, depth, panel);
      float* const panel_sums = sums + (whole ? 0 : n / kPanelRows * groups * kSums);
      for (size_t g = 0; g < groups;) {
        const size_t taken = groups_of_tile(groups - g);
        const uint8_t* tile = packed + g * depth.count * group_vector;
        kTile[taken - 1](tile, panel, depth.count, first > 0, panel_sums + g * kSums);
        g += taken;
      }
      if (first + depth.count < vectors) continue;
      for (size_t g = 0; g < groups; ++g) {
        const size_t t = g * kLanes;
        store_sums(panel_sums + g * kSums, std::min(kLanes, count - t), std::min(kPanelRows, rows - n),
                   y + t * stride + n, stride);
      }
    }
  }
}

template <class W>
size_t vectors_of(size_t width) {
  const size_t bytes = width * W::kBytes;
  return ceil_div(bytes, 64) * W::kVectors;
}

template <class W>
void multiply_as(const uint8_t* w, size_t rows, const void* const* x, size_t count, size_t width, float* y,
                 size_t stride) {
  using Few = void (*)(const uint8_t*, const void* const*, size_t, float*, size_t);
  static constexpr Few kFew[] = {dot_few<W, 1>, dot_few<W, 2>, dot_few<W, 3>, dot_few<W, 4>,
                                 dot_few<W, 5>, dot_few<W, 6>, dot_few<W, 7>, dot_few<W, 8>};
  if (count > 8) return multiply_many<W>(w, rows, x, count, width, vectors_of<W>(width), y, stride);
  if (count == 0) return;
  for (size_t n = 0; n < rows; ++n) kFew[count - 1](w + n * width * W::kBytes, x, width, y + n, stride);
}

template <class W>
void pack_as(const float* x, size_t width, uint8_t* to) {
  constexpr size_t kStep = 64 / W::kBytes, kPacked = W::kVectors * 64;
  size_t k = 0;
  for (; k + kStep <= width; k += kStep, to += kPacked) W::pack(x + k, to);
  if (k == width) return;
  alignas(64) float rest[kStep] = {};
  std::copy(x + k, x + width, rest);
  W::pack(rest, to);
}

// Calls f(W()) with the weights of a form.
template <class F>
auto with_weights(Form form, const F& f) {
  switch (form) {
    case Form::f32_f32:
      return f(Weights<Form::f32_f32>());
    case Form::f32_bf16:
      return f(Weights<Form::f32_bf16>());
    case Form::f32_f16:
      return f(Weights<Form::f32_f16>());
    case Form::bf16_bf16:
      return f(Weights<Form::bf16_bf16>());
    case Form::bf16_e4m3:
      break;
  }
  return f(Weights<Form::bf16_e4m3>());
}

size_t packed_bytes(Form form, size_t width) {
  return with_weights(form, [&](auto weights) { return vectors_of<decltype(weights)>(width) * 64; });
}

void pack(Form form, const float* x, size_t width, void* packed) {
  with_weights(form, [&](auto weights) { pack_as<decltype(weights)>(x, width, static_cast<uint8_t*>(packed)); });
}

void multiply(Form form, const void* weights, size_t rows, const void* const* activations, size_t count, size_t width,
              float* y, size_t stride) {
  const auto* w = static_cast<const uint8_t*>(weights);
  with_weights(form,
               [&](auto weights) { multiply_as<decltype(weights)>(w, rows, activations, count, width, y, stride); });
}

}  // namespace

const Gemm kGemmAvx512 = {packed_bytes, pack, multiply, quantize_row, silu_mul};

}  // namespace glm
