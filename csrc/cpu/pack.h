// Operands of cpu/product.h packed a vector at a time, from any of the formats and either order in
// memory: contiguous along k, or along the index (the rows or lanes of the product).
//
// What is packed is rounded to the format F of cpu/words.h. Along k, a vector is kWidth words of
// one index; along the index, one word of kWidth indices. A block of kWidth vectors is turned from
// one into the other in registers.
//
// Internal linkage: compiled once per instruction set.
#pragma once

#include "core/matrix.h"
#include "cpu/words.h"

namespace rlir::cpu {
namespace {  // nothing here may be shared between instruction sets

// An operand [index][k]: a Matrix whose major is the index and whose minor is k, one stride 1.
inline bool runs_along_k(const Matrix& m) { return m.minor_stride == 1; }

inline const void* element(const Matrix& m, int64_t index, int64_t k) {
  const int64_t size = m.dtype == Dtype::kFloat32 ? 4 : 2;
  return static_cast<const char*>(m.data) + (index * m.major_stride + k * m.minor_stride) * size;
}

// The first n of kWidth * kParts elements at x, zeros behind them.
template <int kParts>
struct Part {
  alignas(64) char data[kParts * kWidth * 4] = {};
  Part(const void* x, Dtype dtype, int64_t n) {
    __builtin_memcpy(data, x, static_cast<uint64_t>(n) * (dtype == Dtype::kFloat32 ? 4 : 2));
  }
};

#if defined(__AVX512BF16__)
// Two vectors as bfloat16, one behind the other: round_to_bfloat16 in one instruction.
inline __m512i round_pair(Vf first, Vf second) {
  return (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
}
#endif

// kWidth words of elements that lie side by side along k.
template <typename F>
inline Vf load_words(const void* x, Dtype dtype) {
  if constexpr (F::kPerWord == 2) {
#if defined(__AVX512BF16__)
    Vf words;
    if (dtype == Dtype::kBFloat16) {
      __builtin_memcpy(&words, x, sizeof words);
      return words;
    }
    return (Vf)round_pair(load_values(x, dtype, 0), load_values(x, dtype, kWidth));
#endif
  } else if constexpr (F::kSwapped) {
    return __builtin_shuffle(F::rounded(load_values(x, dtype, 0)), kLaneNumbers ^ 1);
  } else {
    return load_values(x, dtype, 0);
  }
}

// Words w .. w + kWidth - 1 of one index; zeros from `depth` on.
template <typename F>
inline Vf words_along(const Matrix& m, int64_t index, int64_t w, int64_t depth) {
  const int64_t k = w * F::kPerWord, rest = depth - k;
  if (rest >= kWidth * F::kPerWord) return load_words<F>(element(m, index, k), m.dtype);
  if (rest <= 0) return Vf{};
  const Part<F::kPerWord> part(element(m, index, k), m.dtype, rest);
  return load_words<F>(part.data, m.dtype);
}

// Element k of indices first .. first + kWidth - 1; zeros from `count` and from `depth` on.
inline Vf values_across(const Matrix& m, int64_t first, int64_t count, int64_t k, int64_t depth) {
  if (k >= depth || first >= count) return Vf{};
  const void* x = element(m, first, k);
  if (count - first >= kWidth) return load_values(x, m.dtype, 0);
  return load_values(Part<1>(x, m.dtype, count - first).data, m.dtype, 0);
}

// Word w of indices first .. first + kWidth - 1.
template <typename F>
inline Vf words_across(const Matrix& m, int64_t first, int64_t count, int64_t w, int64_t depth) {
  if constexpr (F::kPerWord == 2) {
#if defined(__AVX512BF16__)
    const Vf low = values_across(m, first, count, 2 * w, depth);
    const Vf high = values_across(m, first, count, 2 * w + 1, depth);
    if (m.dtype == Dtype::kBFloat16) return (Vf)((Vu)low >> 16 | (Vu)high);
    const __m512i interleave = (__m512i)(kLaneNumbers | (kLaneNumbers + kWidth) << 16);
    return (Vf)_mm512_permutexvar_epi16(interleave, round_pair(low, high));
#endif
  } else {
    return F::rounded(values_across(m, first, count, F::kSwapped ? w ^ 1 : w, depth));
  }
}

// kWidth vectors, rows and columns exchanged.
inline void transpose(Vf* v) {
#pragma GCC unroll 4
  for (int bit = 1; bit < kWidth; bit *= 2) {
    const Vi upper = (kLaneNumbers & bit) != 0;
    const Vi low = upper ? kLaneNumbers - bit + kWidth : kLaneNumbers;
    const Vi high = upper ? kLaneNumbers + kWidth : kLaneNumbers + bit;
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i) {
      if ((i & bit) != 0) continue;
      const Vf a = v[i], b = v[i + bit];
      v[i] = __builtin_shuffle(a, b, low);
      v[i + bit] = __builtin_shuffle(a, b, high);
    }
  }
}

constexpr int64_t kAhead = 16;  // words of k that are asked for in advance

// One panel [words][kPanel]: indices first .. first + lanes - 1 of `count`. Whole vectors of lanes
// are written, zeros in those beyond the last index.
template <typename F>
inline void pack_lanes(typename F::Word* panel, const Matrix& m, int64_t first, int64_t lanes,
                       int64_t count, int64_t depth) {
  const int64_t words = words_for<F>(depth);
  float* to = reinterpret_cast<float*>(panel);
  if (!runs_along_k(m)) {
    for (int64_t w = 0; w < words; ++w) {
      // Elements of the next k are far from these: memory does not bring them by itself.
      for (int64_t i = 0; i < F::kPerWord; ++i) {
        const int64_t k = at_most((w + kAhead) * F::kPerWord + i, depth - 1);
        __builtin_prefetch(element(m, first, k));
        __builtin_prefetch(element(m, at_most(first + lanes, count) - 1, k));
      }
      for (int64_t i = 0; i < lanes; i += kWidth) {
        store_vector(to + w * kPanel + i, words_across<F>(m, first + i, count, w, depth));
      }
    }
    return;
  }
  for (int64_t w = 0; w < words; w += kWidth) {
    for (int64_t i = 0; i < lanes; i += kWidth) {
      Vf block[kWidth];
#pragma GCC unroll 16
      for (int j = 0; j < kWidth; ++j) {
        const int64_t index = first + i + j;
        block[j] = index < count ? words_along<F>(m, index, w, depth) : Vf{};
      }
      transpose(block);
      const int64_t n = at_most(words - w, kWidth);
      for (int64_t j = 0; j < n; ++j) store_vector(to + (w + j) * kPanel + i, block[j]);
    }
  }
}

// Words of a packed row: whole vectors, and an odd number of them, so that neighbouring rows do
// not meet in one set of the first cache.
template <typename F>
inline int64_t packed_row_words(int64_t depth) {
  return round_up(words_for<F>(depth), 2 * kLanes16) + kLanes16;
}

// Rows begin .. end - 1, `begin` a multiple of kWidth, each of packed_row_words; `rows` is row 0.
// Rows up to a multiple of kWidth are written.
template <typename F>
inline void pack_words(typename F::Word* rows, const Matrix& m, int64_t begin, int64_t end,
                       int64_t depth) {
  const int64_t words = words_for<F>(depth), stride = packed_row_words<F>(depth);
  float* to = reinterpret_cast<float*>(rows);
  if (runs_along_k(m)) {
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t w = 0; w < words; w += kWidth) {
        store_vector(to + i * stride + w, words_along<F>(m, i, w, depth));
      }
    }
    return;
  }
  for (int64_t w = 0; w < words; w += kWidth) {
    for (int64_t i = begin; i < end; i += kWidth) {
      Vf block[kWidth];
      const int64_t next = i + 2 * kWidth;
      if (next < end) {  // where the next blocks come from and go to
        for (int j = 0; j < kWidth; ++j) {
          __builtin_prefetch(to + (i + kWidth + j) * stride + w, 1, 3);
        }
        for (int64_t j = 0; j < kWidth * F::kPerWord; ++j) {
          __builtin_prefetch(element(m, next, at_most(w * F::kPerWord + j, depth - 1)));
        }
      }
#pragma GCC unroll 16
      for (int j = 0; j < kWidth; ++j) block[j] = words_across<F>(m, i, end, w + j, depth);
      transpose(block);
      for (int j = 0; j < kWidth; ++j) store_vector(to + (i + j) * stride + w, block[j]);
    }
  }
}

}  // namespace
}  // namespace rlir::cpu
