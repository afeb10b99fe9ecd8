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

template <int kDegree>
RLIR_ANYWHERE static inline Vf exp2_weight(Vf t) {
  static_assert(kDegree == 4 || kDegree == 6);
  constexpr float kRounder = 0x1.8p23f;
  const Vf shifted = t + splat(kRounder);
#if defined(__AVX512DQ__) && !defined(RLIR_KERNEL_SOURCE)
  const Vf r = (Vf)_mm512_maskz_reduce_ps(0xffff, (__m512)t, _MM_FROUND_NO_EXC);  // to nearest even
#else
  const Vf r = t - (shifted - splat(kRounder));
#endif
  Vf p;
  if constexpr (kDegree == 6) {
    p = fma(splat(0x1.41d334p-13f), r, splat(0x1.5f456ap-10f));
    p = fma(p, r, splat(0x1.3b2dbcp-7f));
    p = fma(p, r, splat(0x1.c6aed4p-5f));
    p = fma(p, r, splat(0x1.ebfbdap-3f));
    p = fma(p, r, splat(0x1.62e430p-1f));
    p = fma(p, r, splat(1.0f));
  } else {
    p = fma(splat(0x1.3997d6p-7f), r, splat(0x1.ca1440p-5f));
    p = fma(p, r, splat(0x1.ec06dap-3f));
    p = fma(p, r, splat(0x1.62e0dcp-1f));
    p = fma(p, r, splat(0x1.ffffe8p-1f));
  }
#if !defined(RLIR_KERNEL_SOURCE)
  if constexpr (kDegree == 4) {
    // n is added to the exponent of p. shifted is 1.5 2^23 + n, whose own bits leave at the top; so
    // do a NaN's, which here comes from bfloat16: it ends in zeros.
    const Vf weight = as_real(as_int(p) + shift_left(as_int(shifted), 23));
    return select(t < splat(kLeastExponent), splat(0.0f), weight);
  }
#endif
  const Vf power = as_real(shift_left(as_int(shifted) - as_int(splat(kRounder)) + 127, 23));
  return select(t < splat(kLeastExponent), splat(0.0f), p * power);
}

}  // namespace rlir
