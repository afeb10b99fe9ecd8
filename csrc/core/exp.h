// The project's own exp and log: the same bits on every instruction set, with every C library and
// in CUDA kernels.
//
// Every step is one correctly rounded operation, and multiply-adds are fused everywhere (simd.h).
//
// exp(x) = 2^n (1 + (r + r^2 q(r))), n = round(x / ln 2), r = x - n ln 2. exp(0) is exactly 1. The
// error is below 1.02 ulp, subnormal results included; overflow gives infinity, NaN stays NaN.
#pragma once

#include <stdint.h>

#include "core/simd.h"

namespace rlir {

// What exp needs to know of a number format.
template <typename T>
struct ExpConstants;

template <>
struct ExpConstants<float> {
  static constexpr int kMantissa = 23, kBias = 127;
  static constexpr float kLowest = -104.0f, kHighest = 89.0f;
  static constexpr float kRounder = 0x1.8p23f;  // adding it rounds to a whole number
  static constexpr float kInverseLn2 = 0x1.715476p+0f;
  static constexpr float kLn2High = 0x1.62e400p-1f, kLn2Low = 0x1.7f7d1cp-20f;
  static constexpr int kDegree = 5;  // (e^r - 1 - r) / r^2, the coefficients of Cephes' expf
  RLIR_ANYWHERE static constexpr float q(int k) {  // device code has no arrays of a class
    constexpr float kQ[kDegree + 1] = {5.0000001201e-1f, 1.6666665459e-1f, 4.1665795894e-2f,
                                       8.3334519073e-3f, 1.3981999507e-3f, 1.9875691500e-4f};
    return kQ[k];
  }
};

template <>
struct ExpConstants<double> {
  static constexpr int kMantissa = 52, kBias = 1023;
  static constexpr double kLowest = -746.0, kHighest = 710.0;
  static constexpr double kRounder = 0x1.8p52;
  static constexpr double kInverseLn2 = 0x1.71547652b82fep+0;
  static constexpr double kLn2High = 0x1.62e42fee00000p-1, kLn2Low = 0x1.a39ef35793c76p-33;
  static constexpr int kDegree = 11;  // Taylor: 1 / (k + 2)!, 4e-18 of e^r
  RLIR_ANYWHERE static constexpr double q(int k) {
    constexpr double kQ[kDegree + 1] = {1.0 / 2,        1.0 / 6,         1.0 / 24,
                                        1.0 / 120,      1.0 / 720,       1.0 / 5040,
                                        1.0 / 40320,    1.0 / 362880,    1.0 / 3628800,
                                        1.0 / 39916800, 1.0 / 479001600, 1.0 / 6227020800};
    return kQ[k];
  }
};

// exp(x), and what loses no digits near 0: exp(x) - 1 and exp(x) - 1 - x.
template <typename T>
struct Exp {
  typename Simd<T>::Vector exp, expm1, excess;
};

template <typename T>
RLIR_ANYWHERE static inline Exp<T> exp_of(typename Simd<T>::Vector x) {
  using S = ExpConstants<T>;
  using Vector = typename Simd<T>::Vector;
  using Int = typename Simd<T>::Int;
  Vector y = x > S::kHighest ? splat(S::kHighest) : x;
  y = y < S::kLowest ? splat(S::kLowest) : y;
  const Vector shifted = fma(y, splat(S::kInverseLn2), splat(S::kRounder));
  const Vector n = shifted - S::kRounder;
  const Int exponent = as_int(shifted) - as_int(splat(S::kRounder));
  Vector r = fma(n, splat(-S::kLn2High), y);
  r = fma(n, splat(-S::kLn2Low), r);
  Vector q = splat(S::q(S::kDegree));
#if defined(__CUDACC__)
#pragma unroll
#endif
  for (int k = S::kDegree - 1; k >= 0; --k) q = fma(q, r, splat(S::q(k)));
  const Vector square = r * r;
  const Vector grown = fma(square, q, r);  // e^r - 1
  // In two steps: the first product is exact, so a subnormal result is rounded once.
  const Int half = exponent >> 1;
  const Vector low = as_real(shift_left(half + S::kBias, S::kMantissa));
  const Vector high = as_real(shift_left(exponent - half + S::kBias, S::kMantissa));
  Exp<T> out;
  out.exp = (T(1) + grown) * low * high;
  const Int near = exponent == 0;  // then r is x
  out.expm1 = near ? grown : out.exp - T(1);
  out.excess = near ? square * q : out.exp - T(1) - x;
  return out;
}

RLIR_ANYWHERE static inline Vf exp(Vf x) { return exp_of<float>(x).exp; }

// ln x in double, within 2 ulp; -infinity for 0, NaN below. For one value a row.
//
// x = 2^k m with m from sqrt(1/2) to sqrt(2); ln m = 2 atanh(f), f = (m - 1) / (m + 1), by its
// series, whose next term is below 2^-58. No fused multiply-adds: the same bits everywhere.
RLIR_ANYWHERE static inline double log(double x) {
  if (!(x > 0.0)) return x == 0.0 ? -__builtin_inf() : __builtin_nan("");
  if (x == __builtin_inf()) return x;
  int64_t k = 0;
  if (x < 0x1p-1022) {
    x *= 0x1p54;
    k = -54;
  }
  const uint64_t bits = __builtin_bit_cast(uint64_t, x);
  k += static_cast<int64_t>(bits >> 52) - 1023;
  double m = __builtin_bit_cast(double, (bits & 0xfffffffffffffu) | 0x3ff0000000000000u);
  if (m > 0x1.6a09e667f3bcdp0) {
    m *= 0.5;
    k += 1;
  }
  const double f = (m - 1.0) / (m + 1.0), s = f * f;
  double series = 1.0 / 23;
#if defined(__CUDACC__)
#pragma unroll
#endif
  for (int i = 21; i >= 3; i -= 2) series = series * s + 1.0 / i;
  const double scale = static_cast<double>(k);
  // ln2 in two parts; scale * high is exact. m - 1 is exact, and so 2f is off by half an ulp.
  const double small = 2.0 * f * s * series + scale * 0x1.ef35793c76730p-45;
  return scale * 0x1.62e42fefa3800p-1 + (2.0 * f + small);
}

}  // namespace rlir
