// The arithmetic of one token of the policy's loss, and what becomes of a row's sums: the same for
// vectors of tokens on a CPU and single ones in a CUDA kernel. Formula: policy_loss.h.
//
// Internal linkage throughout: compiled once per instruction set.
#pragma once

#include "core/exp.h"
#include "cpu/policy_loss_totals.h"

namespace rlir::cpu {
namespace {  // nothing here may be shared between instruction sets

constexpr double kKlLimit = 20.0;

// Of a native vector of tokens. A CUDA kernel gets it as a parameter, made on the host.
template <typename T>
struct Token {
  using S = Simd<T>;
  using V = typename S::Vector;
  using I = typename S::Int;

  V low, high, delta, truncated, kl_limit;
  V zero = splat(T(0)), one = splat(T(1));
  KlEstimator estimator;
  bool cispo;

  explicit Token(const PolicyLoss& f)
      : low(splat(static_cast<T>(f.low))),
        high(splat(static_cast<T>(f.high))),
        delta(splat(static_cast<T>(f.delta))),
        truncated(splat(static_cast<T>(f.truncated))),
        kl_limit(splat(static_cast<T>(kKlLimit))),
        estimator(f.kl),
        cispo(f.cispo) {}

  RLIR_ANYWHERE V at_most_high(V c) const { return c > high ? high : c; }

  // gain / v; NaN ratios stay NaN.
  RLIR_ANYWHERE V gain(V c, V a, V p) const {
    if (cispo) return a == zero ? zero : at_most_high(c) * a * p;
    const V x = (c > delta ? delta : c) * a;
    const V y = (c < low ? low : at_most_high(c)) * a;
    return a == zero ? zero : (x < y ? x : y);
  }

  // d gain / d log c, of the clipped losses: what min and clamp let pass.
  RLIR_ANYWHERE V slope(V c, V a) const {
    const I inside = (c >= low) & (c <= high);
    const V x = (c > delta ? delta : c) * a;
    const V y = (c < low ? low : at_most_high(c)) * a;
    const V first = c > delta ? zero : c, second = inside | (c != c) ? c : zero;
    return a == zero ? zero : (x <= y ? first : second) * a;
  }

  RLIR_ANYWHERE V importance(V o, V u, I* cut) const {
    const V v = exp_of<T>(o - u).exp;
    *cut = v > truncated;
    return *cut ? truncated : (v != v ? one : v);
  }

  RLIR_ANYWHERE V kl(V p, V q) const {
    const V d = p - q;
    if (estimator == KlEstimator::kK1) return d;
    if (estimator == KlEstimator::kK2) return T(0.5) * d * d;
    const V x = q - p;
    const Exp<T> e = exp_of<T>(x > kl_limit ? kl_limit : x);
    return x > kl_limit ? e.exp - x - T(1) : e.excess;
  }

  RLIR_ANYWHERE V kl_slope(V p, V q) const {
    if (estimator == KlEstimator::kK1) return one;
    if (estimator == KlEstimator::kK2) return p - q;
    const V x = q - p;
    return x > kl_limit ? one : -exp_of<T>(x).expm1;
  }
};

// Makes of the sums of a row's tokens what PolicyLossRow says. `ratio`: of the row, at sequence
// level, where `slope` comes as the sum over tokens.
RLIR_ANYWHERE inline void finish_row(const PolicyLoss& f, double ratio, PolicyLossRow* r) {
  const double n = at_least_one(r->tokens), here = r->tokens > 0.0 ? 1.0 : 0.0;
  if (f.sequence) {
    r->ratio = r->lowest = r->highest = ratio * here;
    r->square = ratio * ratio * here;
    r->clipped_low /= n;
    r->clipped_high /= n;
    r->clipped_delta /= n;
    r->outside /= n;
    r->slope = -r->slope / n;
    if (f.kl_importance && f.kl_weight != 0.0) r->slope += f.kl_weight * r->kl / n;
  }
  r->present = here;
  r->term =
      (f.kl_weight == 0.0 ? -r->gain : f.kl_weight * r->kl - r->gain) / row_divisor(f, r->tokens);
}

}  // namespace
}  // namespace rlir::cpu
