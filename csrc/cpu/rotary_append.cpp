// Formulas: rotary_append.h.
//
// Why one kernel: a decoding step has a few tokens and so costs what its calls cost; eager PyTorch
// makes some twenty, and writes the rotated keys once more before it copies them to their slots.
#include "cpu/rotary_append.h"

#include <stddef.h>

#include "cpu/rotate.h"

namespace rlir::cpu::RLIR_ISA {
namespace {

// Bit for bit, or rounded.
template <Dtype kFrom, Dtype kTo>
void copy_head(const void* x, int64_t at, int64_t dim, void* to, int64_t to_at) {
  if constexpr (kFrom == kTo) {
    constexpr int64_t kBytes = kFrom == Dtype::kFloat32 ? 4 : 2;
    __builtin_memcpy(static_cast<char*>(to) + to_at * kBytes,
                     static_cast<const char*>(x) + at * kBytes, static_cast<size_t>(dim * kBytes));
  } else {
    store_row(to, kTo, to_at, static_cast<const float*>(x) + at, dim);
  }
}

template <Dtype kFrom, Dtype kTo, bool kInterleaved>
void append_tokens(const RotaryAppend& a, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; ++n) {
    const int64_t b = n / a.tokens, t = n % a.tokens, slot = a.positions[n];
    const float *c = a.cosine + slot * a.dim, *s = a.sine + slot * a.dim;
    const auto at = [&](const RotaryRows& rows, int64_t token, int64_t head) {
      return b * rows.batch + token * rows.token + head * rows.head;
    };
    for (int64_t h = 0; h < a.heads; ++h) {
      rotate_head<kFrom, kTo, kInterleaved, false>(a.q, at(a.q_at, t, h), c, s, a.dim, a.out,
                                                   (n * a.heads + h) * a.dim);
    }
    for (int64_t h = 0; h < a.kv_heads; ++h) {
      rotate_head<kFrom, kTo, kInterleaved, false>(a.k, at(a.k_at, t, h), c, s, a.dim, a.cache_k,
                                                   at(a.cache_k_at, slot, h));
      copy_head<kFrom, kTo>(a.v, at(a.v_at, t, h), a.dim, a.cache_v, at(a.cache_v_at, slot, h));
    }
  }
}

template <Dtype kFrom, Dtype kTo>
void append_dtype(const RotaryAppend& a, int64_t begin, int64_t end) {
  a.interleaved ? append_tokens<kFrom, kTo, true>(a, begin, end)
                : append_tokens<kFrom, kTo, false>(a, begin, end);
}

}  // namespace

void rotary_append(const RotaryAppend& a, int64_t begin, int64_t end) {
  constexpr Dtype kFloat = Dtype::kFloat32, kBFloat = Dtype::kBFloat16;
  if (a.dtype == kBFloat) return append_dtype<kBFloat, kBFloat>(a, begin, end);
  a.to == kFloat ? append_dtype<kFloat, kFloat>(a, begin, end)
                 : append_dtype<kFloat, kBFloat>(a, begin, end);
}

}  // namespace rlir::cpu::RLIR_ISA
