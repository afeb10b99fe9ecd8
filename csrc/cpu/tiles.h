// The product of cpu/product.h by AMX tiles: pairs of bfloat16, in files compiled for AMX.
//
// Layout. The product's own: a tile of A is 16 rows by 16 words straight from the rows, a tile of B
// 16 words by 16 lanes straight from the panel, a tile of C 16 rows by 16 lanes of c. Six of the
// eight tile registers are C (32 rows by 48 lanes), one is A and one is B: seven loads go with six
// tdpbf16ps. Where rows or words end inside a tile, it is copied with zeros beyond, since tiles
// read all they cover and 0 times NaN is NaN.
//
// Order. tdpbf16ps takes 32 steps of k: a sum of the even and one of the odd k, each a chain of
// fused multiply-adds from zero, are added to each other and then to C. Groups of 32 start at
// multiples of 32 from the product's first k and are added up in order, so that a row's bits
// depend neither on batch nor threads nor where the work is cut (at multiples of 32). They are not
// those of vdpbf16ps. Subnormals are zeros, as there.
//
// Bounds. c is written in whole tiles: up to 15 rows beyond `count`, and lanes of a panel beyond
// `lanes` up to the next multiple of 16.
//
// Internal linkage, as in cpu/product.h, which includes this.
#pragma once

#include <immintrin.h>
#include <stdint.h>

namespace rlir::cpu {
namespace {  // nothing here may be shared between instruction sets

constexpr int kTile = 16;      // rows of a tile, and words of a row
constexpr int64_t kLine = 64;  // of a cache, in bytes
// Words a block: a panel's part, 24 KiB, stays in the first level cache while rows go by, which the
// second level alone could hardly feed: six tdpbf16ps are 96 cycles and want 5 KiB.
constexpr int64_t kTileDepth = 128;
static_assert(kPanel == 3 * kTile && kRowPad == 2 * kTile);

// What ldtilecfg reads.
struct alignas(64) TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(TileConfig) == 64);
constexpr TileConfig kWholeTiles = {
    1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

// The intrinsics of gcc do not say that they read memory.
inline void memory_is_written() { __asm__ volatile("" ::: "memory"); }

// A thread may run a part of any parallel_for, so that kernels configure the tiles as they are
// called and release them as they return: registers in use are 8 KiB that the system saves and
// restores at each context switch, and may keep the core from its deepest sleep.
template <typename Format>
struct ProductScope<Format, true> {
  ProductScope() {
    const void* config = &kWholeTiles;
    __asm__ volatile("" : "+r"(config)::"memory");  // only 8 of 64 bytes are an operand in gcc
    _tile_loadconfig(config);
  }
  ~ProductScope() { _tile_release(); }
};

// Where a tile is loaded from: `stride` bytes between its rows.
struct TileSource {
  const void* data;
  int64_t stride;
};

// A tile's words with zeros beyond `rows` rows and `words` words.
inline TileSource padded(uint32_t* copy, const uint32_t* data, int64_t stride, int64_t rows,
                         int64_t words) {
#if defined(RLIR_FAULT_TILE_PADDING)
  words = kTile;
#endif
  const auto mask = static_cast<__mmask16>((1u << words) - 1);
  for (int64_t i = 0; i < kTile; ++i) {
    _mm512_store_si512(copy + i * kTile, i < rows
                                             ? _mm512_maskz_loadu_epi32(mask, data + i * stride)
                                             : _mm512_setzero_si512());
  }
  memory_is_written();
  return {copy, kTile * sizeof(uint32_t)};
}

// C and B of a product: floats, or words, between their rows.
struct TileStrides {
  int64_t c, panel;
};

struct TileCopies {
  alignas(64) uint32_t a[2][kTile * kTile], b[3][kTile * kTile];
};

// c [16 or 32 rows] of `count` rows, at most 32, against kUsed times 16 lanes of a panel.
template <int kUsed, bool kTwo>
__attribute__((noinline)) void tile_rows(float* c, TileStrides strides, const uint32_t* rows,
                                         int64_t stride, int64_t count, const uint32_t* panel,
                                         int64_t words, bool more, Ahead ahead) {
  constexpr int64_t kWordBytes = sizeof(uint32_t);
  const int64_t c_bytes = strides.c * kWordBytes, panel_bytes = strides.panel * kWordBytes;
  float* below = c + kTile * strides.c;
  if (more) {
    memory_is_written();
    _tile_loadd(0, c, c_bytes);
    if constexpr (kUsed > 1) _tile_loadd(1, c + kTile, c_bytes);
    if constexpr (kUsed > 2) _tile_loadd(2, c + 2 * kTile, c_bytes);
    if constexpr (kTwo) {
      _tile_loadd(3, below, c_bytes);
      if constexpr (kUsed > 1) _tile_loadd(4, below + kTile, c_bytes);
      if constexpr (kUsed > 2) _tile_loadd(5, below + 2 * kTile, c_bytes);
    }
  } else {
    _tile_zero(0);
    if constexpr (kUsed > 1) _tile_zero(1);
    if constexpr (kUsed > 2) _tile_zero(2);
    if constexpr (kTwo) {
      _tile_zero(3);
      if constexpr (kUsed > 1) _tile_zero(4);
      if constexpr (kUsed > 2) _tile_zero(5);
    }
  }
  TileCopies copies;
  for (int64_t k = 0; k < words; k += kTile) {
    const int64_t here = at_most(kTile, words - k);
    const auto source_a = [&](int64_t first) -> TileSource {
      const uint32_t* data = rows + first * stride + k;
      const int64_t left = at_most(kTile, count - first);
      if (here == kTile && left == kTile) return {data, stride * kWordBytes};
      return padded(copies.a[first / kTile], data, stride, left, here);
    };
    const auto source_b = [&](int64_t lane) -> TileSource {
      const uint32_t* data = panel + k * strides.panel + lane;
      if (here == kTile) return {data, panel_bytes};
      return padded(copies.b[lane / kTile], data, strides.panel, here, kTile);
    };
    for (int64_t i = 0; i < ahead.lines; ++i) {
      __builtin_prefetch(ahead.from, 0, 2);
      ahead.from += kLine;
    }
    const TileSource b0 = source_b(0), b1 = kUsed > 1 ? source_b(kTile) : b0,
                     b2 = kUsed > 2 ? source_b(2 * kTile) : b0, a0 = source_a(0);
    _tile_loadd(6, a0.data, a0.stride);
    _tile_loadd(7, b0.data, b0.stride);
    _tile_dpbf16ps(0, 6, 7);
    if constexpr (kUsed > 1) {
      _tile_loadd(7, b1.data, b1.stride);
      _tile_dpbf16ps(1, 6, 7);
    }
    if constexpr (kUsed > 2) {
      _tile_loadd(7, b2.data, b2.stride);
      _tile_dpbf16ps(2, 6, 7);
    }
    if constexpr (kTwo) {  // backwards: the last tile of B is there
#if defined(RLIR_FAULT_TILE_ROWS)
      const TileSource a1 = source_a(0);
#else
      const TileSource a1 = source_a(kTile);
#endif
      _tile_loadd(6, a1.data, a1.stride);
      if constexpr (kUsed > 2) {
        _tile_dpbf16ps(5, 6, 7);
        _tile_loadd(7, b1.data, b1.stride);
      }
      if constexpr (kUsed > 1) {
        _tile_dpbf16ps(4, 6, 7);
        _tile_loadd(7, b0.data, b0.stride);
      }
      _tile_dpbf16ps(3, 6, 7);
    }
  }
  _tile_stored(0, c, c_bytes);
  if constexpr (kUsed > 1) _tile_stored(1, c + kTile, c_bytes);
  if constexpr (kUsed > 2) _tile_stored(2, c + 2 * kTile, c_bytes);
  if constexpr (kTwo) {
    _tile_stored(3, below, c_bytes);
    if constexpr (kUsed > 1) _tile_stored(4, below + kTile, c_bytes);
    if constexpr (kUsed > 2) _tile_stored(5, below + 2 * kTile, c_bytes);
  }
}

template <bool kTwo>
inline void tile_lanes(int lanes, float* c, TileStrides strides, const uint32_t* rows,
                       int64_t stride, int64_t count, const uint32_t* panel, int64_t words,
                       bool more, Ahead ahead) {
  const auto kernel = lanes > 2 * kTile ? tile_rows<3, kTwo>
                      : lanes > kTile   ? tile_rows<2, kTwo>
                                        : tile_rows<1, kTwo>;
  kernel(c, strides, rows, stride, count, panel, words, more, ahead);
}

// At most 3 tiles of lanes, any strides; otherwise as panel_product, which says what `more` is.
template <typename Between = NothingBetween>
inline void tile_product(float* c, TileStrides strides, const uint32_t* first, int64_t stride,
                         int64_t count, const uint32_t* panel, int64_t words, int lanes, bool more,
                         Ahead ahead, const Between& between = {}) {
  static_assert(kTileDepth % kTile == 0);
  for (int64_t k = 0; k < words; k += kTileDepth) {
    const int64_t depth = at_most(kTileDepth, words - k);
    for (int64_t j = 0; j < count; j += 2 * kTile) {
      between();
      const int64_t left = at_most(2 * kTile, count - j);
      const auto kernel = left > kTile ? tile_lanes<true> : tile_lanes<false>;
      kernel(lanes, c + j * strides.c, strides, first + j * stride + k, stride, left,
             panel + k * strides.panel, depth, more || k > 0, ahead);
      ahead.from += ahead.lines * ((depth + kTile - 1) / kTile) * kLine;
    }
  }
}

template <typename Between>
inline void tile_product(float* c, const uint32_t* first, int64_t stride, int64_t count,
                         const uint32_t* panel, int64_t words, int lanes, bool more,
                         const void* next, const Between& between) {
  constexpr int64_t kLines = kTile * kPanel * sizeof(uint32_t) / kLine;  // of a panel, 16 words
  // So that the next panel is asked for by the time all rows are done.
  const int64_t turns = (count + 2 * kTile - 1) / (2 * kTile);
  const Ahead ahead = {static_cast<const char*>(next),
                       next == nullptr || turns == 0 ? 0 : (kLines + turns - 1) / turns};
  if (words == 0 && !more) {
    __builtin_memset(c, 0, sizeof(float) * kPanel * round_up(count, kTile));
  }
  tile_product(c, {kPanel, kPanel}, first, stride, count, panel, words, lanes, more, ahead,
               between);
}

}  // namespace
}  // namespace rlir::cpu
