// The rotation of one head's vector, for rotary and rotary_append: formulas in cpu/rotary.h.
//
// Products and sums are rounded one by one, as in cpu/decoder.cpp and in eager PyTorch, so all give
// the same bits.
//
// Internal linkage: compiled once per instruction set.
#pragma once

#include "cpu/rows.h"

namespace rlir::cpu {
namespace {  // nothing here may be shared between instruction sets

typedef uint64_t Vpairs __attribute__((vector_size(kWidth * 4)));

// Neighbours exchanged: (x1, x0, x3, x2, ...).
inline Vf exchange(Vf x) {
  const Vpairs pairs = (Vpairs)x;
  return (Vf)(pairs << 32 | pairs >> 32);
}

// The sign of elements 0, 2, ... or of 1, 3, ... turned.
inline Vf negate_even(Vf x) { return (Vf)((Vpairs)x ^ (Vpairs{} + 0x80000000u)); }
inline Vf negate_odd(Vf x) { return (Vf)((Vpairs)x ^ (Vpairs{} + 0x8000000000000000u)); }

template <Dtype kDtype>
inline void store_value(void* out, int64_t at, float value) {
  if constexpr (kDtype == Dtype::kFloat32) {
    static_cast<float*>(out)[at] = value;
  } else {
    store(static_cast<BFloat16*>(out) + at, static_cast<double>(value));
  }
}

// Elements i and j of a head are a pair.
template <Dtype kFrom, Dtype kTo, bool kTransposed>
inline void rotate_pair(const void* x, int64_t at, const float* c, const float* s, int64_t i,
                        int64_t j, void* out, int64_t out_at) {
  const float first = value_of(x, kFrom, at + i), second = value_of(x, kFrom, at + j);
  const float upper = second * (kTransposed ? s[j] : -s[i]);
  const float lower = first * (kTransposed ? -s[i] : s[j]);
  store_value<kTo>(out, out_at + i, first * c[i] + upper);
  store_value<kTo>(out, out_at + j, second * c[j] + lower);
}

template <Dtype kFrom, Dtype kTo, bool kInterleaved, bool kTransposed>
inline void rotate_head(const void* x, int64_t at, const float* c, const float* s, int64_t dim,
                        void* out, int64_t out_at) {
  if constexpr (kInterleaved) {
    int64_t i = 0;
    for (; i + kWidth <= dim; i += kWidth) {
      const Vf value = load_values(x, kFrom, at + i), sine = load_vector(s + i);
      const Vf turn = kTransposed ? negate_odd(exchange(sine)) : negate_even(sine);
      store_values(out, kTo, out_at + i, value * load_vector(c + i) + exchange(value) * turn);
    }
    for (; i < dim; i += 2) {
      rotate_pair<kFrom, kTo, kTransposed>(x, at, c, s, i, i + 1, out, out_at);
    }
  } else {
    const int64_t half = dim / 2;
    int64_t i = 0;
    for (; i + kWidth <= half; i += kWidth) {
      const int64_t j = i + half;
      const Vf first = load_values(x, kFrom, at + i), second = load_values(x, kFrom, at + j);
      const Vf upper = second * (kTransposed ? load_vector(s + j) : -load_vector(s + i));
      const Vf lower = first * (kTransposed ? -load_vector(s + i) : load_vector(s + j));
      store_values(out, kTo, out_at + i, first * load_vector(c + i) + upper);
      store_values(out, kTo, out_at + j, second * load_vector(c + j) + lower);
    }
    for (; i < half; ++i) {
      rotate_pair<kFrom, kTo, kTransposed>(x, at, c, s, i, i + half, out, out_at);
    }
  }
}

}  // namespace
}  // namespace rlir::cpu
