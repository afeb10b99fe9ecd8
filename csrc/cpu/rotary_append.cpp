// Formulas: rotary_append.h.
//
// Why one kernel: a decoding step has a few tokens and so costs what its calls cost; eager PyTorch
// makes some twenty, and writes the rotated keys once more before it copies them to their slots.
#include "cpu/rotary_append.h"

#include <stddef.h>

#include "cpu/rotate.h"

namespace rlir::cpu::RLIR_ISA {
namespace {

template <Dtype kDtype, bool kInterleaved>
void append_tokens(const RotaryAppend& a, int64_t begin, int64_t end) {
  constexpr int64_t kBytes = kDtype == Dtype::kFloat32 ? 4 : 2;
  for (int64_t n = begin; n < end; ++n) {
    const int64_t b = n / a.tokens, t = n % a.tokens, slot = a.positions[n];
    const float *c = a.cosine + slot * a.dim, *s = a.sine + slot * a.dim;
    const auto at = [&](const RotaryRows& rows, int64_t token, int64_t head) {
      return b * rows.batch + token * rows.token + head * rows.head;
    };
    for (int64_t h = 0; h < a.heads; ++h) {
      rotate_head<kDtype, kInterleaved, false>(a.q, at(a.q_at, t, h), c, s, a.dim, a.out,
                                               (n * a.heads + h) * a.dim);
    }
    for (int64_t h = 0; h < a.kv_heads; ++h) {
      rotate_head<kDtype, kInterleaved, false>(a.k, at(a.k_at, t, h), c, s, a.dim, a.cache_k,
                                               at(a.cache_k_at, slot, h));
      __builtin_memcpy(static_cast<char*>(a.cache_v) + at(a.cache_v_at, slot, h) * kBytes,
                       static_cast<const char*>(a.v) + at(a.v_at, t, h) * kBytes,
                       static_cast<size_t>(a.dim * kBytes));
    }
  }
}

template <Dtype kDtype>
void append_dtype(const RotaryAppend& a, int64_t begin, int64_t end) {
  a.interleaved ? append_tokens<kDtype, true>(a, begin, end)
                : append_tokens<kDtype, false>(a, begin, end);
}

}  // namespace

void rotary_append(const RotaryAppend& a, int64_t begin, int64_t end) {
  a.dtype == Dtype::kFloat32 ? append_dtype<Dtype::kFloat32>(a, begin, end)
                             : append_dtype<Dtype::kBFloat16>(a, begin, end);
}

}  // namespace rlir::cpu::RLIR_ISA
