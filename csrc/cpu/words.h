// What a product reads along k, written from floats: the formats of the decoder's activations.
//
//   Plain    a word is a float                                            (a float32 policy)
//   Pairs    a word is two bfloat16 of neighbouring k, for vdpbf16ps      (a bfloat16 policy)
//   Swapped  a word is a float that holds a bfloat16, the two k of a pair exchanged: the bits of
//            Pairs without its instruction                                (a bfloat16 policy)
//
// cpu/product.h says why these agree. Subnormals become zeros in the bfloat16 formats, since
// vdpbf16ps reads them so.
//
// Internal linkage: compiled once per instruction set.
#pragma once

#include "cpu/product.h"
#include "cpu/rows.h"

namespace rlir::cpu {
namespace {  // nothing here may be shared between instruction sets

constexpr int64_t kLanes16 = 16;  // rows of floats are padded to whole groups of 16

typedef uint32_t Vu __attribute__((vector_size(kWidth * 4)));

// The nearest bfloat16, ties to even, as a float.
inline Vf round_to_bfloat16(Vf x) {
  const Vu bits = (Vu)x, magnitude = bits & 0x7fffffffu;
  const Vu rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u;
  const Vf value = select((Vi)(magnitude < 0x00800000u), (Vf)(bits & 0x80000000u), (Vf)rounded);
  return select((Vi)(magnitude > 0x7f800000u), x + x, value);
}

struct Plain : FloatFormat {
  static constexpr bool kSwapped = false;
  static inline Vf rounded(Vf x) { return x; }
  // Values k .. k + kWidth - 1 of a row, k a multiple of kWidth; they are `rounded` already.
  static inline void put(Word* row, int64_t k, Vf x) { store_vector(row + k, x); }
};

#if defined(__AVX512BF16__)
struct Pairs : PairFormat {
  static constexpr bool kSwapped = false;
  static inline Vf rounded(Vf x) { return round_to_bfloat16(x); }
  static inline void put(Word* row, int64_t k, Vf x) {
    const __m512i upper = _mm512_srli_epi32((__m512i)x, 16);
    const __m256i bits = _mm512_maskz_cvtepi32_epi16(0xffff, upper);
    __builtin_memcpy(reinterpret_cast<uint16_t*>(row) + k, &bits, sizeof bits);
  }
};
typedef Pairs BFloat16Words;
#else
struct Swapped : FloatFormat {
  static constexpr bool kSwapped = true;
  static inline Vf rounded(Vf x) { return round_to_bfloat16(x); }
  static inline void put(Word* row, int64_t k, Vf x) {
    store_vector(row + k, __builtin_shuffle(x, kLaneNumbers ^ 1));
  }
};
typedef Swapped BFloat16Words;
#endif

// Words of a depth, a pair never split; and of a depth padded to groups of 16, where rows end.
template <typename F>
inline int64_t words_for(int64_t depth) {
  return words_of<F>(depth, F::kSwapped);
}
template <typename F>
inline int64_t row_words(int64_t depth) {
  return round_up(depth, kLanes16) / F::kPerWord;
}

// A row of words from n floats; n is padded to whole vectors on both sides.
template <typename F>
inline void put_row(typename F::Word* row, const float* x, int64_t n) {
  for (int64_t k = 0; k < n; k += kWidth) F::put(row, k, F::rounded(load_vector(x + k)));
}

// Position n (from 0) of a column of words; what is at the other half of its pair stays.
template <typename F>
inline void put_column(typename F::Word* words, int64_t stride, int64_t n, int64_t lane,
                       float rounded) {
  if constexpr (F::kPerWord == 2) {
    const uint32_t bits = __builtin_bit_cast(uint32_t, rounded) >> 16;
    typename F::Word* word = words + n / 2 * stride + lane;
    *word = n % 2 == 0 ? (*word & 0xffff0000u) | bits : (*word & 0xffffu) | bits << 16;
  } else {
    words[(F::kSwapped ? n ^ 1 : n) * stride + lane] = rounded;
  }
}

}  // namespace
}  // namespace rlir::cpu
