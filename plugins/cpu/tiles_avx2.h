// Many activation rows times weight rows, in blocks that stay in the caches.
//
// Up to 24 tokens are a tile: packed [k][tokens], so that a lane is a token and a weight, broadcast, meets all of them.
// Nothing is summed across lanes, and weights keep their order. Three vectors of tokens and four weight rows make
// twelve sums, which is what sixteen registers allow: seven loads for twelve products, so the multipliers are the
// limit.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "plugins/cpu/kernel.h"

namespace glm {
namespace {

constexpr size_t kDepth = 256;  // elements of a row at a time: a tile of 24 tokens then takes 24 KiB of the first cache
constexpr size_t kPanelRows = 48;  // weight rows widened at a time, 48 KiB in the second cache; a multiple of 4, 6, 12
constexpr size_t kTileVectors = 3;
constexpr size_t kTileTokens = 8 * kTileVectors;
constexpr size_t kBlockTokens = 192;  // whose tiles take 192 KiB of the second cache

// An 8 x 8 block, transposed: row i of `from` becomes column i.
inline void transpose(__m256 (&r)[8]) {
  __m256 t[8];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    r[4 * i] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
    r[4 * i + 1] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
    r[4 * i + 2] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
    r[4 * i + 3] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m256 low = _mm256_permute2f128_ps(r[i], r[4 + i], 0x20);
    r[4 + i] = _mm256_permute2f128_ps(r[i], r[4 + i], 0x31);
    r[i] = low;
  }
}

// Elements k .. k + depth of `count` packed rows, as tile [depth][8 * vectors]; missing tokens are zero.
inline void pack_tile(const void* const* x, size_t count, size_t k, size_t depth, size_t vectors, float* tile) {
  for (size_t v = 0; v < vectors; ++v) {
    for (size_t i = 0; i < depth; i += 8) {
      __m256 r[8];
#pragma GCC unroll 8
      for (size_t t = 0; t < 8; ++t) {
        const size_t token = 8 * v + t;
        r[t] = token < count ? _mm256_load_ps(static_cast<const float*>(x[token]) + k + i) : _mm256_setzero_ps();
      }
      transpose(r);
#pragma GCC unroll 8
      for (size_t t = 0; t < 8; ++t) _mm256_store_ps(tile + ((i + t) * vectors + v) * 8, r[t]);
    }
  }
}

// sums [rows][stride] += weights [rows][kDepth] . tile [depth][8 * vectors]; stride is counted in tokens.
template <size_t vectors, size_t rows>
inline void multiply_tile(const float* weights, const float* tile, size_t depth, bool first, float* sums,
                          size_t stride) {
  __m256 sum[rows][vectors];
#pragma GCC unroll 12
  for (size_t n = 0; n < rows; ++n) {
#pragma GCC unroll 3
    for (size_t v = 0; v < vectors; ++v) {
      sum[n][v] = first ? _mm256_setzero_ps() : _mm256_load_ps(sums + n * stride + 8 * v);
    }
  }
  for (size_t k = 0; k < depth; ++k) {
    __m256 value[vectors];
#pragma GCC unroll 3
    for (size_t v = 0; v < vectors; ++v) value[v] = _mm256_load_ps(tile + (k * vectors + v) * 8);
#pragma GCC unroll 12
    for (size_t n = 0; n < rows; ++n) {
      const __m256 weight = _mm256_broadcast_ss(weights + n * kDepth + k);
#pragma GCC unroll 3
      for (size_t v = 0; v < vectors; ++v) sum[n][v] = _mm256_fmadd_ps(weight, value[v], sum[n][v]);
    }
  }
#pragma GCC unroll 12
  for (size_t n = 0; n < rows; ++n) {
#pragma GCC unroll 3
    for (size_t v = 0; v < vectors; ++v) _mm256_store_ps(sums + n * stride + 8 * v, sum[n][v]);
  }
}

// The same for a panel of up to kPanelRows weight rows, in steps of `rows`; what lies beyond the last row is computed
// and not used.
template <size_t vectors>
void multiply_panel(const float* weights, size_t panel_rows, const float* tile, size_t depth, bool first, float* sums,
                    size_t stride) {
  constexpr size_t rows = 12 / vectors;
  for (size_t n = 0; n < panel_rows; n += rows) {
    multiply_tile<vectors, rows>(weights + n * kDepth, tile, depth, first, sums + n * stride, stride);
  }
}

// y[m * stride + n] = sums[n * tokens + m] * factor
inline void store_sums(const float* sums, size_t rows, size_t tokens, size_t count, float factor, float* y,
                       size_t stride) {
  const __m256 factors = _mm256_set1_ps(factor);
  size_t n = 0;
  for (; n + 8 <= rows; n += 8) {
    for (size_t m = 0; m < count; m += 8) {
      __m256 r[8];
#pragma GCC unroll 8
      for (size_t i = 0; i < 8; ++i) r[i] = _mm256_mul_ps(_mm256_load_ps(sums + (n + i) * tokens + m), factors);
      transpose(r);
#pragma GCC unroll 8
      for (size_t i = 0; i < 8; ++i) {
        if (m + i < count) _mm256_storeu_ps(y + (m + i) * stride + n, r[i]);
      }
    }
  }
  for (; n < rows; ++n) {
    for (size_t m = 0; m < count; ++m) y[m * stride + n] = sums[n * tokens + m] * factor;
  }
}

// Memory of one thread that grows to what a product needs and stays, so that a step touches no fresh pages.
struct Workspace {
  std::vector<float> memory;
  // `count` floats, 64-byte aligned.
  float* floats(size_t count) {
    if (memory.size() < count + 16) memory.resize(count + 16);
    return reinterpret_cast<float*>(whole_lines(reinterpret_cast<uintptr_t>(memory.data())));
  }
};

// widen(n, k, depth, wide) writes elements k .. k + depth of weight row n, in the order of the packed rows.
template <class Widen>
void multiply_tiles(const Widen& widen, size_t rows, const void* const* x, size_t count, size_t width, float factor,
                    float* y, size_t stride) {
  thread_local Workspace workspace;
  for (size_t start = 0; start < count; start += kBlockTokens) {
    const size_t block = std::min(kBlockTokens, count - start);
    const size_t tokens = round_up(block, 8);
    const size_t padded_rows = round_up(rows, kPanelRows);
    float* tiles = workspace.floats(tokens * kDepth + kPanelRows * kDepth + padded_rows * tokens);
    float* panel = tiles + tokens * kDepth;
    float* sums = panel + kPanelRows * kDepth;  // [padded_rows][tokens]
    for (size_t k = 0; k < width; k += kDepth) {
      const size_t depth = std::min(kDepth, width - k);
      for (size_t m = 0; m < tokens; m += kTileTokens) {
        const size_t vectors = std::min(kTileVectors, (tokens - m) / 8);
        pack_tile(x + start + m, std::min(kTileTokens, block - m), k, depth, vectors, tiles + m * kDepth);
      }
      for (size_t n = 0; n < rows; n += kPanelRows) {
        const size_t panel_rows = std::min(kPanelRows, rows - n);
        for (size_t i = 0; i < panel_rows; ++i) widen(n + i, k, depth, panel + i * kDepth);
        for (size_t m = 0; m < tokens; m += kTileTokens) {
          const float* tile = tiles + m * kDepth;
          float* into = sums + n * tokens + m;
          switch (std::min(kTileVectors, (tokens - m) / 8)) {
            case 3:
              multiply_panel<3>(panel, panel_rows, tile, depth, k == 0, into, tokens);
              break;
            case 2:
              multiply_panel<2>(panel, panel_rows, tile, depth, k == 0, into, tokens);
              break;
            default:
              multiply_panel<1>(panel, panel_rows, tile, depth, k == 0, into, tokens);
          }
        }
      }
    }
    store_sums(sums, rows, tokens, block, factor, y + start * stride, stride);
  }
}

}  // namespace
}  // namespace glm
