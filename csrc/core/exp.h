// exp on native vectors of float and double: the same bits on every instruction set.
//
// Every step is one correctly rounded operation, and multiply-adds are fused everywhere (simd.h).
//
// exp(x) = 2^n (1 + (r + r^2 q(r))), n = round(x / ln 2), r = x - n ln 2. exp(0) is exactly 1. The
// error is below 1 ulp, subnormal results included; overflow gives infinity, NaN stays NaN.
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
  static constexpr int kDegree = 4;  // minimax of (e^r - 1 - r) / r^2: 8e-9 of e^r
  static constexpr float kQ[kDegree + 1] = {0.5f, 0x1.5554dcp-3f, 0x1.5554b8p-5f, 0x1.120ba6p-7f,
                                            0x1.6d7594p-10f};
};

template <>
struct ExpConstants<double> {
  static constexpr int kMantissa = 52, kBias = 1023;
  static constexpr double kLowest = -746.0, kHighest = 710.0;
  static constexpr double kRounder = 0x1.8p52;
  static constexpr double kInverseLn2 = 0x1.71547652b82fep+0;
  static constexpr double kLn2High = 0x1.62e42fee00000p-1, kLn2Low = 0x1.a39ef35793c76p-33;
  static constexpr int kDegree = 11;  // Taylor: 1 / (k + 2)!, 4e-18 of e^r
  static constexpr double kQ[kDegree + 1] = {
      1.0 / 2,     1.0 / 6,      1.0 / 24,      1.0 / 120,      1.0 / 720,       1.0 / 5040,
      1.0 / 40320, 1.0 / 362880, 1.0 / 3628800, 1.0 / 39916800, 1.0 / 479001600, 1.0 / 6227020800};
};

// exp(x), and what loses no digits near 0: exp(x) - 1 and exp(x) - 1 - x.
template <typename T>
struct Exp {
  typename Simd<T>::Vector exp, expm1, excess;
};

template <typename T>
static inline Exp<T> exp_of(typename Simd<T>::Vector x) {
  using S = ExpConstants<T>;
  using Vector = typename Simd<T>::Vector;
  using Int = typename Simd<T>::Int;
  Vector y = x > S::kHighest ? splat<T>(S::kHighest) : x;
  y = y < S::kLowest ? splat<T>(S::kLowest) : y;
  const Vector shifted = fused(y, splat<T>(S::kInverseLn2), splat<T>(S::kRounder));
  const Vector n = shifted - S::kRounder;
  const Int exponent = (Int)shifted - (Int)splat<T>(S::kRounder);
  Vector r = fused(n, splat<T>(-S::kLn2High), y);
  r = fused(n, splat<T>(-S::kLn2Low), r);
  Vector q = splat<T>(S::kQ[S::kDegree]);
  for (int k = S::kDegree - 1; k >= 0; --k) q = fused(q, r, splat<T>(S::kQ[k]));
  const Vector square = r * r;
  const Vector grown = fused(square, q, r);  // e^r - 1
  // In two steps: the first product is exact, so a subnormal result is rounded once.
  const Int half = exponent >> 1;
  const Vector low = (Vector)((half + S::kBias) << S::kMantissa);
  const Vector high = (Vector)((exponent - half + S::kBias) << S::kMantissa);
  Exp<T> out;
  out.exp = (T(1) + grown) * low * high;
  const Int near = exponent == 0;  // then r is x
  out.expm1 = near ? grown : out.exp - T(1);
  out.excess = near ? square * q : out.exp - T(1) - x;
  return out;
}

}  // namespace rlir
