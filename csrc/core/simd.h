// Vectors of the instruction set a file is compiled for, and the project's own exp and log.
//
// Every function works element by element and gives the same bits at every width: a fused
// multiply-add is asked for by name (std::fma's, one rounding), nothing is contracted by the
// compiler, and no libm is called, whose results differ between versions.
//
// Internal linkage throughout, as in core/dtype.h.
#pragma once

#include <stdint.h>

#if defined(__AVX512F__) || (defined(__AVX2__) && defined(__FMA__))
#include <immintrin.h>
#endif

namespace rlir {

#if defined(__AVX512F__)
static constexpr int kWidth = 16;
#elif defined(__AVX2__) && defined(__FMA__)
static constexpr int kWidth = 8;
#else
static constexpr int kWidth = 4;
#endif

typedef float Vf __attribute__((vector_size(kWidth * 4)));
typedef int32_t Vi __attribute__((vector_size(kWidth * 4)));

#if defined(__AVX512F__)
static const Vi kLaneNumbers = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#elif defined(__AVX2__) && defined(__FMA__)
static const Vi kLaneNumbers = {0, 1, 2, 3, 4, 5, 6, 7};
#else
static const Vi kLaneNumbers = {0, 1, 2, 3};
#endif

static inline Vf splat(float x) { return x - Vf{}; }

static inline Vf load_vector(const float* x) {
  Vf v;
  __builtin_memcpy(&v, x, sizeof v);
  return v;
}

static inline void store_vector(float* out, Vf v) { __builtin_memcpy(out, &v, sizeof v); }

// a b + c, rounded once.
static inline Vf fma(Vf a, Vf b, Vf c) {
#if defined(__AVX512F__)
  return (Vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__) && defined(__FMA__)
  return (Vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  for (int i = 0; i < kWidth; ++i) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return c;
#endif
}

// `mask` has all bits set where `a` is taken.
static inline Vf select(Vi mask, Vf a, Vf b) { return mask ? a : b; }

static inline Vf max(Vf a, Vf b) { return select(a > b, a, b); }  // b where either is NaN

// e^x, within 1.02 ulp for all x. Subnormal results are kept; NaN stays NaN.
//
// x = n ln2 + r with |r| <= ln2 / 2; e^r by a polynomial (the coefficients of Cephes' expf); 2^n
// in two factors, because 2^-149 is a float and 2^n for n < -126 is not an exponent.
static inline Vf exp(Vf x) {
  x = select(x < splat(-104.0f), splat(-104.0f), x);
  x = select(x > splat(89.0f), splat(89.0f), x);
  const Vf magic = splat(0x1.8p23f);  // adding it leaves the nearest integer in the low bits
  const Vf shifted = fma(x, splat(0x1.715476p+0f), magic);
  const Vi n = (Vi)shifted - (Vi)magic;
  const Vf whole = shifted - magic;
  Vf r = fma(whole, splat(-0x1.62e4p-1f), x);
  r = fma(whole, splat(-0x1.7f7d1cp-20f), r);
  Vf p = splat(1.9875691500e-4f);
  p = fma(p, r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  p = fma(p, r * r, r) + 1.0f;
  const Vi half = n >> 1;
  const Vf low = (Vf)((half + 127) << 23), high = (Vf)((n - half + 127) << 23);
  return p * low * high;
}

// ln x in double, within 2 ulp; -infinity for 0, NaN below. For one value a row.
//
// x = 2^k m with m from sqrt(1/2) to sqrt(2); ln m = 2 atanh(f), f = (m - 1) / (m + 1), by its
// series, whose next term is below 2^-58. No fused multiply-adds: the same bits everywhere.
static inline double log(double x) {
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
  for (int i = 21; i >= 3; i -= 2) series = series * s + 1.0 / i;
  const double scale = static_cast<double>(k);
  // ln2 in two parts; scale * high is exact. m - 1 is exact, and so 2f is off by half an ulp.
  const double small = 2.0 * f * s * series + scale * 0x1.ef35793c76730p-45;
  return scale * 0x1.62e42fefa3800p-1 + (2.0 * f + small);
}

}  // namespace rlir
