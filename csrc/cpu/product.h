// The product that selected_logprob is made of: outputs C[j][lane] += sum_k rows[j][k]
// panel[k][lane].
//
// Layout. One operand is packed in panels of kPanel lanes, panel[k][lane], so that a step of k is
// a few vector loads; of the other, a value is broadcast to all lanes, from rows that are
// contiguous in k. Accumulators of kRows rows by a panel stay in registers for kDepth steps.
//
// Order. An output is a chain of fused multiply-adds over 128 steps of k; chains start at multiples
// of 128 and are added up in order. (One chain over all of k would be as fast and lose two bits
// where k is long.) That holds whatever the width of the vectors, the position of the output in a
// tile, or the blocks that the work is cut into, and is what makes a row's bits independent of
// batch, threads and instruction set.
//
// Formats. kFloat: a word is a float. kPairs (files compiled for AVX-512 with BF16): a word is two
// bfloat16 of neighbouring k, and vdpbf16ps does two steps at once: first the odd k, then the
// even one, each rounded to nearest as a fused multiply-add; subnormals are zeros. To have the
// same bits without that instruction, products of two bfloat16 operands are packed as floats with
// the two k of a pair exchanged (`swapped`). In files compiled for AMX the product of pairs is
// cpu/tiles.h's, with bits of its own.
//
// Internal linkage throughout: compiled once per instruction set.
#pragma once

#include "core/matrix.h"
#include "core/simd.h"

namespace rlir::cpu {
namespace {  // nothing here may be shared between instruction sets

#if defined(__AVX512F__)
constexpr int kVectors = 3, kRows = 8;  // 24 accumulators of 32 registers
#elif defined(__AVX2__) && defined(__FMA__)
constexpr int kVectors = 2, kRows = 6;  // 12 of 16
#else
constexpr int kVectors = 4, kRows = 2;
#endif
#if defined(__AMX_BF16__)
constexpr int kRowPad = 32;  // rows that a product may write at once: two tiles
#else
constexpr int kRowPad = kRows;
#endif
constexpr int kPanel = kVectors * kWidth;
constexpr int64_t kChain = 128;  // steps of k
constexpr int64_t kDepth = 512;  // words of k a block: a panel's part stays in the L2 cache

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
inline int64_t at_most(int64_t n, int64_t limit) { return n < limit ? n : limit; }

// float operands.
struct FloatFormat {
  typedef float Word;
  static constexpr int kPerWord = 1;
  typedef Vf Lanes;
  static inline Lanes broadcast(const Word* x) { return splat(*x); }
  static inline Lanes load_lanes(const Word* x) { return load_vector(x); }
  static inline Vf multiply_add(Lanes a, Lanes b, Vf c) { return fma(a, b, c); }
};

#if defined(__AVX512BF16__)
// Pairs of bfloat16, the lower k in the lower half.
struct PairFormat {
  typedef uint32_t Word;
  static constexpr int kPerWord = 2;
  typedef __m512i Lanes;
  static inline Lanes broadcast(const Word* x) { return _mm512_set1_epi32(static_cast<int>(*x)); }
  static inline Lanes load_lanes(const Word* x) { return _mm512_loadu_si512(x); }
  static inline Vf multiply_add(Lanes a, Lanes b, Vf c) {
    return (Vf)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
  }
};
#endif

// Whether a product goes through cpu/tiles.h.
#if defined(__AMX_BF16__)
template <typename Format>
constexpr bool kTiled = Format::kPerWord == 2;
template <typename Between>
inline void tile_product(float* c, const uint32_t* first, int64_t stride, int64_t count,
                         const uint32_t* panel, int64_t words, int lanes, bool more,
                         const void* next, const Between& between);
#else
template <typename Format>
constexpr bool kTiled = false;
#endif

// What a thread has to have while it calls panel_product: nothing, but for tiles.
template <typename Format, bool = kTiled<Format>>
struct ProductScope {
  ProductScope() {}  // so that an unused one is no warning
};

// What a tile asks memory for as it goes, `lines` of 64 bytes a step: the panel that comes next.
// None where lines is 0.
struct Ahead {
  const char* from;
  int64_t lines;
};

// What a caller does between the tiles of a product: nothing.
struct NothingBetween {
  void operator()() const {}
};
// Rows of a product's tile.
template <typename Format>
constexpr int kRowsOf = kTiled<Format> ? 32 : kRows;

// One tile: c [kRows][kPanel], row stride kPanel; rows[j] point to `depth` words.
template <typename Format, int kUsed>
__attribute__((noinline)) void tile(float* c, const typename Format::Word* const* rows,
                                    const typename Format::Word* panel, int64_t depth, bool more,
                                    Ahead ahead) {
  constexpr int64_t kWords = kChain / Format::kPerWord;
  const typename Format::Word* at[kRows];
#pragma GCC unroll 8
  for (int j = 0; j < kRows; ++j) at[j] = rows[j];
  for (int64_t begin = 0; begin < depth; begin += kWords) {
    const int64_t end = at_most(begin + kWords, depth);
    Vf sums[kRows][kUsed];
#pragma GCC unroll 8
    for (int j = 0; j < kRows; ++j) {
#pragma GCC unroll 4
      for (int i = 0; i < kUsed; ++i) sums[j][i] = Vf{};
    }
    for (int64_t k = begin; k < end; ++k) {
      typename Format::Lanes lanes[kUsed];
#pragma GCC unroll 4
      for (int i = 0; i < kUsed; ++i) {
        lanes[i] = Format::load_lanes(panel + k * kPanel + i * kWidth);
      }
      for (int64_t i = 0; i < ahead.lines; ++i) {
        __builtin_prefetch(ahead.from, 0, 2);
        ahead.from += 64;
      }
#pragma GCC unroll 8
      for (int j = 0; j < kRows; ++j) {
        const typename Format::Lanes value = Format::broadcast(at[j] + k);
#pragma GCC unroll 4
        for (int i = 0; i < kUsed; ++i) {
          sums[j][i] = Format::multiply_add(lanes[i], value, sums[j][i]);
        }
      }
    }
    const bool adds = more || begin > 0;
#pragma GCC unroll 8
    for (int j = 0; j < kRows; ++j) {
#pragma GCC unroll 4
      for (int i = 0; i < kUsed; ++i) {
        float* out = c + j * kPanel + i * kWidth;
        store_vector(out, adds ? load_vector(out) + sums[j][i] : sums[j][i]);
      }
    }
  }
}

template <typename Format>
inline void tile(int lanes, float* c, const typename Format::Word* const* rows,
                 const typename Format::Word* panel, int64_t depth, bool more, Ahead ahead) {
  const int used = (lanes + kWidth - 1) / kWidth;  // a last panel may have few lanes
  if (used >= kVectors) return tile<Format, kVectors>(c, rows, panel, depth, more, ahead);
  if (kVectors > 3 && used == 3) return tile<Format, 3>(c, rows, panel, depth, more, ahead);
  if (used == 2) return tile<Format, 2>(c, rows, panel, depth, more, ahead);
  return tile<Format, 1>(c, rows, panel, depth, more, ahead);
}

// c [count rounded up to kRowPad][kPanel] of rows first, first + 1, ... with `stride` words between
// them, against one panel of `words` words. `more` adds to what c holds. `next`, if not null, is
// the panel that the caller reads next: it is brought into the second level cache meanwhile.
// `between` is called before each kRowsOf rows.
template <typename Format, typename Between = NothingBetween>
inline void panel_product(float* c, const typename Format::Word* first, int64_t stride,
                          int64_t count, const typename Format::Word* panel, int64_t words,
                          int lanes, bool more, const void* next = nullptr,
                          const Between& between = {}) {
  if constexpr (kTiled<Format>) {
    return tile_product(c, first, stride, count, panel, words, lanes, more, next, between);
  } else {
    constexpr int64_t kLine = 64, kStep = kPanel * sizeof(typename Format::Word) / kLine;
    // So that the next panel is asked for by the time all tiles are done.
    const int64_t tiles = (count + kRows - 1) / kRows;
    Ahead ahead = {static_cast<const char*>(next),
                   next == nullptr || tiles == 0 ? 0 : (kStep + tiles - 1) / tiles};
    if (words == 0 && !more) {
      __builtin_memset(c, 0, sizeof(float) * kPanel * round_up(count, kRows));
    }
    for (int64_t k = 0; k < words; k += kDepth) {
      const int64_t depth = at_most(kDepth, words - k);
      for (int64_t j = 0; j < count; j += kRows) {
        between();
        const typename Format::Word* rows[kRows];
        for (int i = 0; i < kRows; ++i) {  // past the end: the last row again, into unused space
          rows[i] = first + at_most(j + i, count - 1) * stride + k;
        }
        tile<Format>(lanes, c + j * kPanel, rows, panel + k * kPanel, depth, more || k > 0, ahead);
        ahead.from += ahead.lines * depth * kLine;
      }
    }
  }
}

}  // namespace
}  // namespace rlir::cpu

#if defined(__AMX_BF16__)
#include "cpu/tiles.h"
#endif

namespace rlir::cpu {
namespace {

// --- Packing -------------------------------------------------------------------------------------

inline float value_at(const Matrix& m, int64_t i, int64_t j) {
  const int64_t at = i * m.major_stride + j * m.minor_stride;
  return m.dtype == Dtype::kFloat32
             ? static_cast<const float*>(m.data)[at]
             : static_cast<float>(load(static_cast<const BFloat16*>(m.data) + at));
}

inline uint32_t bits_at(const Matrix& m, int64_t i, int64_t j) {
  return static_cast<const BFloat16*>(m.data)[i * m.major_stride + j * m.minor_stride].bits;
}

// Words of k = 0 .. depth - 1, a pair never split.
template <typename Format>
inline int64_t words_of(int64_t depth, bool swapped) {
  return Format::kPerWord == 2 ? (depth + 1) / 2 : swapped ? round_up(depth, 2) : depth;
}

// Word `w` of `m` along its minor dimension (along_minor) or its major one, at index `i` of the
// other; `depth` is the extent along k, and beyond it are zeros.
template <typename Format>
inline typename Format::Word word_at(const Matrix& m, bool along_minor, int64_t i, int64_t w,
                                     int64_t depth, bool swapped) {
  if constexpr (Format::kPerWord == 2) {
    const int64_t k = 2 * w;
    const uint32_t low = along_minor ? bits_at(m, i, k) : bits_at(m, k, i);
    if (k + 1 >= depth) return low;
    return low | (along_minor ? bits_at(m, i, k + 1) : bits_at(m, k + 1, i)) << 16;
  } else {
    const int64_t k = swapped ? w ^ 1 : w;
    if (k >= depth) return 0.0f;
    return along_minor ? value_at(m, i, k) : value_at(m, k, i);
  }
}

// One panel: lanes first .. first + lanes - 1 of `m`, zeros in those beyond.
template <typename Format>
inline void pack_panel(typename Format::Word* panel, const Matrix& m, bool along_minor,
                       int64_t first, int64_t lanes, int64_t depth, bool swapped) {
  const int64_t words = words_of<Format>(depth, swapped);
  const auto pack = [&](int64_t w, int64_t lane) {
    panel[w * kPanel + lane] =
        lane < lanes ? word_at<Format>(m, along_minor, first + lane, w, depth, swapped)
                     : typename Format::Word{};
  };
  constexpr int64_t kStep = 16;  // words at a time: whole cache lines of either side
  if (along_minor) {
    for (int64_t w0 = 0; w0 < words; w0 += kStep) {
      for (int64_t lane = 0; lane < kPanel; ++lane) {
        for (int64_t w = w0; w < at_most(w0 + kStep, words); ++w) pack(w, lane);
      }
    }
  } else {
    for (int64_t w = 0; w < words; ++w) {
      for (int64_t lane = 0; lane < kPanel; ++lane) pack(w, lane);
    }
  }
}

// Rows begin .. end - 1 for the broadcast side, each of words_of(depth) words, `stride` apart.
// `m` runs along k in its minor dimension, or in its major one (a transposition).
template <typename Format>
inline void pack_rows(typename Format::Word* rows, int64_t stride, const Matrix& m,
                      bool along_minor, int64_t begin, int64_t end, int64_t depth, bool swapped) {
  const int64_t words = words_of<Format>(depth, swapped);
  constexpr int64_t kStep = 16;
  for (int64_t i0 = begin; i0 < end; i0 += along_minor ? 1 : kStep) {
    const int64_t last = along_minor ? i0 + 1 : at_most(i0 + kStep, end);
    for (int64_t w = 0; w < words; ++w) {
      for (int64_t i = i0; i < last; ++i) {
        rows[(i - begin) * stride + w] = word_at<Format>(m, along_minor, i, w, depth, swapped);
      }
    }
  }
}

}  // namespace
}  // namespace rlir::cpu
