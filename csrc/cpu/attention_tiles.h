// What the attention ops need for AMX tiles beyond cpu/tiles.h: values (or keys) as rows along the
// slots, since the weights of a panel of queries are lanes. cpu/attention.h includes this in files
// compiled for AMX.
//
// Internal linkage.
#pragma once

#include "cpu/pack.h"
#include "cpu/video_attention.h"

namespace rlir::cpu {
namespace {  // nothing here may be shared between instruction sets

constexpr int64_t kColumnWords = kKeyBlock / 2;  // of a block's slots: groups of 32 for tiles

// Elements d .. d + 15 of two neighbouring slots as words; null is a row of zeros.
inline Vf pair_words(const void* x0, const void* x1, int64_t d, int64_t dim) {
  const auto mask = static_cast<__mmask16>(dim - d >= 16 ? 0xffff : (1 << (dim - d)) - 1);
  const auto half = [&](const void* x) {
    return x == nullptr
               ? _mm512_setzero_si512()
               : _mm512_maskz_cvtepu16_epi32(
                     0xffff, _mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(x) + d));
  };
  return (Vf)_mm512_or_si512(half(x0), _mm512_maskz_slli_epi32(0xffff, half(x1), 16));
}

// Tiles want d as rows: out [dim padded to 16][kColumnWords], words along the slots, zeros where
// rows [count] is null and beyond, up to a multiple of 32 slots. Whether all is finite is said only
// if `checks`.
inline bool pair_columns(const void* const* rows, int64_t count, int64_t dim, bool checks,
                         uint32_t* out) {
  const Vu upper = Vu{} + 0x7f800000u, lower = Vu{} + 0x7f80u;
  Vi special = {};
  for (int64_t k = 0; k < count; k += 2 * kTile) {
    for (int64_t d = 0; d < dim; d += kTile) {
      Vf words[kTile];
#pragma GCC unroll 16
      for (int j = 0; j < kTile; ++j) {
        const int64_t slot = k + 2 * j;
        words[j] = pair_words(slot < count ? rows[slot] : nullptr,
                              slot + 1 < count ? rows[slot + 1] : nullptr, d, dim);
      }
      if (checks) {
        for (int j = 0; j < kTile; ++j) {
          special |= (((Vu)words[j] & upper) == upper) | (((Vu)words[j] & lower) == lower);
        }
      }
      transpose(words);
      for (int i = 0; i < kTile; ++i) {
        store_vector(reinterpret_cast<float*>(out) + (d + i) * kColumnWords + k / 2, words[i]);
      }
    }
  }
  memory_is_written();
  return _mm512_test_epi32_mask((__m512i)special, (__m512i)special) == 0;
}

// sums [dim][kPanel] += values weights for one lane alone: others of its tile may become NaN.
inline void lane_product(float* sums, int lane, const uint32_t* weights, const uint32_t* values,
                         int64_t steps, int64_t dim) {
  alignas(64) float tile[kTile * kTile];
  const int first = lane / kTile * kTile;
  for (int64_t d = 0; d < dim; d += kTile) {
    const int64_t rows = at_most(kTile, dim - d);
    for (int64_t i = 0; i < rows; ++i) {
      store_vector(tile + i * kTile, load_vector(sums + (d + i) * kPanel + first));
    }
    tile_product(tile, {kTile, kPanel}, values + d * kColumnWords, kColumnWords, rows,
                 weights + first, steps, kTile, true, {});
    for (int64_t i = 0; i < rows; ++i) {
      sums[(d + i) * kPanel + lane] = tile[i * kTile + lane - first];
    }
  }
}

}  // namespace
}  // namespace rlir::cpu
