// Keys and values of a block as a product wants them: words of rows, and words along the slots.
// Formats are those of cpu/words.h; cpu/attention_panel.h puts them to use.
//
// Internal linkage: compiled once per instruction set.
#pragma once

#include "cpu/attention_lanes.h"
#include "cpu/video_attention.h"
#include "cpu/words.h"

#if defined(__AMX_BF16__)
#include "cpu/attention_tiles.h"
#endif

namespace rlir::cpu {
namespace {  // nothing here may be shared between instruction sets

// Element `at` of a tensor of the call's dtype.
inline const void* element(bool bfloat16, const void* x, int64_t at) {
  return static_cast<const char*>(x) + at * (bfloat16 ? 2 : 4);
}
inline void* element(bool bfloat16, void* x, int64_t at) {
  return static_cast<char*>(x) + at * (bfloat16 ? 2 : 4);
}

// --- Words of rows -------------------------------------------------------------------------------

// Rows for the broadcast side of a product: where they lie, or a copy.
template <typename F>
struct Rows {
  const typename F::Word* first;
  int64_t stride;
};

// What holds slots [start, start + count) if they lie in one segment.
inline int segment_of(const KeySource& s, int64_t start, int64_t count) {
  if (start + count <= s.count[0]) return 0;
  return start >= s.count[0] ? 1 : -1;
}

inline const void* slot_row(bool bfloat16, const KeySource& s, bool values, int64_t slot) {
  const int part = slot < s.count[0] ? 0 : 1;
  const int64_t at = part == 0 ? slot : slot - s.count[0];
  return values ? element(bfloat16, s.v[part], at * s.v_stride[part])
                : element(bfloat16, s.k[part], at * s.k_stride[part]);
}

// Keys (or values) of a block as words along d; `copies`: even where they could stay.
template <typename F>
inline Rows<F> block_rows(const KeySource& s, bool values, int64_t start, int64_t count,
                          int64_t dim, bool copies, void* copy) {
  using Word = typename F::Word;
  constexpr int64_t kPer = F::kPerWord;
  constexpr bool kBFloat16 = kPer == 2 || F::kSwapped;
  const int part = segment_of(s, start, count);
  if (!F::kSwapped && part >= 0 && dim % kPer == 0) {
    const int64_t stride = values ? s.v_stride[part] : s.k_stride[part];
    const void* first = slot_row(kBFloat16, s, values, start);
    if (stride == dim) copies = false;  // they lie together
    if (!copies && stride % kPer == 0 && reinterpret_cast<uintptr_t>(first) % sizeof(Word) == 0) {
      return {static_cast<const Word*>(first), stride / kPer};
    }
  }
  const int64_t words = words_for<F>(dim);
  Word* to = static_cast<Word*>(copy);
  for (int64_t i = 0; i < count; ++i) {
    const void* row = slot_row(kBFloat16, s, values, start + i);
    if (!F::kSwapped && dim % kPer == 0) {
      __builtin_memcpy(to + i * words, row, static_cast<uint64_t>(words) * sizeof(Word));
      continue;
    }
    for (int64_t w = 0; w < words; ++w) to[i * words + w] = row_word<F>(row, w, dim);
  }
  return {to, words};
}

// --- Columns: words along key slots (or along queries)
// --------------------------------------------

// Rows x0 and x1 [n] of two neighbouring slots as words; null is a row of zeros. Both rows of words
// are written. n elements, and of the words those up to a multiple of 16.
template <typename F>
inline void pair_rows(typename F::Word* out, int64_t stride, const void* x0, const void* x1,
                      int64_t n) {
  if constexpr (F::kPerWord == 2) {
    const auto *a = static_cast<const uint16_t*>(x0), *b = static_cast<const uint16_t*>(x1);
    int64_t i = 0;
#if defined(__AVX512BF16__)
    if (a != nullptr && b != nullptr) {
      const __m512i lower = (__m512i)(kLaneNumbers | (kLaneNumbers + 32) << 16);
      const __m512i upper = (__m512i)((kLaneNumbers + 16) | (kLaneNumbers + 48) << 16);
      for (; i + 32 <= n; i += 32) {
        __m512i even, odd;
        __builtin_memcpy(&even, a + i, sizeof even);
        __builtin_memcpy(&odd, b + i, sizeof odd);
        store_vector(reinterpret_cast<float*>(out + i),
                     (Vf)_mm512_permutex2var_epi16(even, lower, odd));
        store_vector(reinterpret_cast<float*>(out + i + 16),
                     (Vf)_mm512_permutex2var_epi16(even, upper, odd));
      }
    }
    for (; i + 16 <= n; i += 16) {
      __m256i low = {}, high = {};
      if (a != nullptr) __builtin_memcpy(&low, a + i, sizeof low);
      if (b != nullptr) __builtin_memcpy(&high, b + i, sizeof high);
      const __m512i word = _mm512_or_si512(
          _mm512_maskz_cvtepu16_epi32(0xffff, low),
          _mm512_maskz_slli_epi32(0xffff, _mm512_maskz_cvtepu16_epi32(0xffff, high), 16));
      __builtin_memcpy(out + i, &word, sizeof word);
    }
#endif
    for (; i < n; ++i) {
      out[i] = (a != nullptr ? uint32_t{a[i]} : 0u) | (b != nullptr ? uint32_t{b[i]} << 16 : 0u);
    }
    for (; i % 16 != 0; ++i) out[i] = 0;
  } else {
    typename F::Word *first = F::kSwapped ? out + stride : out,
                     *second = F::kSwapped ? out : out + stride;
    const auto value = [](const void* x, int64_t i) {
      if (x == nullptr) return 0.0f;
      if constexpr (F::kSwapped) return float_of(static_cast<const uint16_t*>(x)[i]);
      return static_cast<const float*>(x)[i];
    };
    for (int64_t i = 0; i < round_up(n, 16); ++i) {
      first[i] = i < n ? value(x0, i) : 0.0f;
      second[i] = i < n ? value(x1, i) : 0.0f;
    }
  }
}

// Two vectors of neighbouring slots as words.
template <typename F>
inline void put_pair(typename F::Word* out, int64_t stride, Vf even, Vf odd) {
#if defined(__AVX512BF16__)
  if constexpr (F::kPerWord == 2) {
    alignas(64) static const uint16_t kInterleave[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                         21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                         11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    __m512i order;
    __builtin_memcpy(&order, kInterleave, sizeof order);
    const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
    const __m512i word = _mm512_maskz_permutexvar_epi16(~__mmask32{0}, order, halves);
    __builtin_memcpy(out, &word, sizeof word);
    return;
  }
#endif
  const Vf first = F::rounded(F::kSwapped ? odd : even),
           second = F::rounded(F::kSwapped ? even : odd);
  store_vector(reinterpret_cast<float*>(out), first);
  store_vector(reinterpret_cast<float*>(out) + stride, second);
}

// sums[d][lanes] += over `steps` words: column [steps][kPanel] of the lanes, words v
// [steps][stride] of d broadcast. Rows d .. d + kRows - 1; past the last one it is repeated, into
// unused space.
template <typename F, int kUsed>
__attribute__((noinline)) void column_tile(float* sums, const typename F::Word* column,
                                           const typename F::Word* const* v, int64_t stride,
                                           int64_t steps) {
  Vf c[kRows][kUsed];
  const typename F::Word* at[kRows];
#pragma GCC unroll 8
  for (int j = 0; j < kRows; ++j) {
    at[j] = v[j];
#pragma GCC unroll 4
    for (int i = 0; i < kUsed; ++i) c[j][i] = load_vector(sums + j * kPanel + i * kWidth);
  }
  for (int64_t s = 0; s < steps; ++s) {
    typename F::Lanes lanes[kUsed];
#pragma GCC unroll 4
    for (int i = 0; i < kUsed; ++i) lanes[i] = F::load_lanes(column + s * kPanel + i * kWidth);
#pragma GCC unroll 8
    for (int j = 0; j < kRows; ++j) {
      const typename F::Lanes value = F::broadcast(at[j] + s * stride);
#pragma GCC unroll 4
      for (int i = 0; i < kUsed; ++i) c[j][i] = F::multiply_add(lanes[i], value, c[j][i]);
    }
  }
#pragma GCC unroll 8
  for (int j = 0; j < kRows; ++j) {
#pragma GCC unroll 4
    for (int i = 0; i < kUsed; ++i) store_vector(sums + j * kPanel + i * kWidth, c[j][i]);
  }
}

template <typename F>
inline typename F::Lanes spread(typename F::Word word) {
  return F::broadcast(&word);
}

template <typename F>
inline void add_columns(float* sums, const typename F::Word* column, const typename F::Word* v,
                        int64_t stride, int64_t steps, int64_t dim, int used) {
#if defined(__AMX_BF16__)
  if constexpr (kTiled<F>) {
    return tile_product(sums, {kPanel, kPanel}, v, kColumnWords, dim, column, steps, used * kWidth,
                        true, {});
  }
#endif
  for (int64_t d = 0; d < dim; d += kRows) {
    const typename F::Word* rows[kRows];
    for (int j = 0; j < kRows; ++j) rows[j] = v + at_most(d + j, dim - 1);
    float* to = sums + d * kPanel;
    if (used >= kVectors) {
      column_tile<F, kVectors>(to, column, rows, stride, steps);
    } else if (kVectors > 3 && used == 3) {
      column_tile<F, 3>(to, column, rows, stride, steps);
    } else if (used == 2) {
      column_tile<F, 2>(to, column, rows, stride, steps);
    } else {
      column_tile<F, 1>(to, column, rows, stride, steps);
    }
  }
}

}  // namespace
}  // namespace rlir::cpu
