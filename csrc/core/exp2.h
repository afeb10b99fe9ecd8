// 2^t for softmax weights: t is at most about 0, and what is below 2^-100 counts as 0.
//
// 2^t = 2^n p(t - n), n = round(t); p is the minimax polynomial of 2^r for |r| <= 1/2. Relative
// error before rounding: 1.9e-9 of degree 6, for float32; 2.6e-6 of degree 4, for weights that are
// rounded to bfloat16. 2^0 is exactly 1 in degree 6. NaN stays NaN. Every step is one correctly
// rounded operation: the same bits on every instruction set and in CUDA kernels (core/simd.h).
#pragma once

#include <stdint.h>

#include "core/simd.h"

namespace rlir {

constexpr float kLeastExponent = -100.0f;
constexpr float kRounder = 0x1.8p23f;  // t + kRounder is 1.5 2^23 + round(t)

template <int kDegree>
RLIR_ANYWHERE static inline Vf exp2_polynomial(Vf r) {
  static_assert(kDegree == 4 || kDegree == 6);
  if constexpr (kDegree == 6) {
    Vf p = fma(splat(0x1.41d334p-13f), r, splat(0x1.5f456ap-10f));
    p = fma(p, r, splat(0x1.3b2dbcp-7f));
    p = fma(p, r, splat(0x1.c6aed4p-5f));
    p = fma(p, r, splat(0x1.ebfbdap-3f));
    p = fma(p, r, splat(0x1.62e430p-1f));
    return fma(p, r, splat(1.0f));
  } else {
    Vf p = fma(splat(0x1.3997d6p-7f), r, splat(0x1.ca1440p-5f));
    p = fma(p, r, splat(0x1.ec06dap-3f));
    p = fma(p, r, splat(0x1.62e0dcp-1f));
    return fma(p, r, splat(0x1.ffffe8p-1f));
  }
}

template <int kDegree>
RLIR_ANYWHERE static inline Vf exp2_weight(Vf t) {
  const Vf shifted = t + splat(kRounder);
  const Vf p = exp2_polynomial<kDegree>(t - (shifted - splat(kRounder)));
  const Vf power = as_real(shift_left(as_int(shifted) - as_int(splat(kRounder)) + 127, 23));
  return select(t < splat(kLeastExponent), splat(0.0f), p * power);
}

#if defined(__AVX512DQ__) && !defined(RLIR_KERNEL_SOURCE)
// The same bits in fewer steps, of degree 4, for the weights of a softmax in bfloat16: t is below
// infinity, and a NaN has zeros in its last 9 bits, as those of bfloat16 have.
static inline Vf softmax_weight(Vf t) {
  typedef uint32_t Bits __attribute__((vector_size(sizeof(Vf))));
  const auto nearest = (Vf)_mm512_maskz_reduce_ps(0xffff, (__m512)t, _MM_FROUND_NO_EXC);
  const Vf p = exp2_polynomial<4>(nearest);  // of t - round(t), ties to even
  // n goes to the exponent: what else is in the sum's bits is shifted out.
  const Bits n = (Bits)(t + splat(kRounder)) << 23;
  return select(t < splat(kLeastExponent), splat(0.0f), (Vf)((Bits)p + n));
}
#else
RLIR_ANYWHERE static inline Vf softmax_weight(Vf t) { return exp2_weight<4>(t); }
#endif

// A softmax's weight, of a call in bfloat16 or in float32.
template <bool kBFloat16>
RLIR_ANYWHERE static inline Vf softmax_weight(Vf t) {
  if constexpr (kBFloat16) {
    return softmax_weight(t);
  } else {
    return exp2_weight<6>(t);
  }
}

}  // namespace rlir
