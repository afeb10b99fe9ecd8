// Vectors of the instruction set that a file is compiled for.
//
// Every function works element by element and gives the same bits at every width: a fused
// multiply-add is asked for by name (std::fma's, one rounding), and nothing is contracted by the
// compiler.
//
// In CUDA kernels a vector is one number, so that what is written in vectors (core/exp.h) gives the
// same bits there.
//
// Internal linkage throughout, as in core/dtype.h.
#pragma once

#include <stdint.h>

#include "core/dtype.h"

#if defined(RLIR_KERNEL_SOURCE)
#include <math.h>
#elif defined(__AVX512F__) || (defined(__AVX2__) && defined(__FMA__))
#include <immintrin.h>
#endif

namespace rlir {

#if defined(RLIR_KERNEL_SOURCE)
static constexpr int kWidth = 1;
#elif defined(__AVX512F__)
static constexpr int kWidth = 16;
#elif defined(__AVX2__) && defined(__FMA__)
static constexpr int kWidth = 8;
#else
static constexpr int kWidth = 4;
#endif
// Vectors of a group of 16, the unit of sums over a row.
static constexpr int kPer16 = kWidth > 1 ? 16 / kWidth : 16;

#if defined(RLIR_KERNEL_SOURCE)
typedef float Vf;
typedef int32_t Vi;
typedef double Vd;
typedef int64_t Vl;
#else
typedef float Vf __attribute__((vector_size(kWidth * 4)));
typedef int32_t Vi __attribute__((vector_size(kWidth * 4)));
typedef double Vd __attribute__((vector_size(kWidth * 4)));
typedef int64_t Vl __attribute__((vector_size(kWidth * 4)));
#endif

// A register of T, and the integers of comparisons.
template <typename T>
struct Simd;

template <>
struct Simd<float> {
  using Vector = Vf;
  using Int = Vi;
  using Word = int32_t;
  static constexpr int kLanes = kWidth;
};

template <>
struct Simd<double> {
  using Vector = Vd;
  using Int = Vl;
  using Word = int64_t;
  static constexpr int kLanes = kWidth > 1 ? kWidth / 2 : 1;
};

#if defined(RLIR_KERNEL_SOURCE)

RLIR_ANYWHERE static inline float splat(float x) { return x; }
RLIR_ANYWHERE static inline double splat(double x) { return x; }
RLIR_ANYWHERE static inline Vi as_int(Vf x) { return __builtin_bit_cast(Vi, x); }
RLIR_ANYWHERE static inline Vl as_int(Vd x) { return __builtin_bit_cast(Vl, x); }
RLIR_ANYWHERE static inline Vf as_real(Vi x) { return __builtin_bit_cast(Vf, x); }
RLIR_ANYWHERE static inline Vd as_real(Vl x) { return __builtin_bit_cast(Vd, x); }
// Bits that are shifted out are lost, also where a NaN has made them nonsense.
RLIR_ANYWHERE static inline Vi shift_left(Vi x, int n) {
  return static_cast<Vi>(static_cast<uint32_t>(x) << n);
}
RLIR_ANYWHERE static inline Vl shift_left(Vl x, int n) {
  return static_cast<Vl>(static_cast<uint64_t>(x) << n);
}
RLIR_ANYWHERE static inline Vf fma(Vf a, Vf b, Vf c) { return ::fmaf(a, b, c); }
RLIR_ANYWHERE static inline Vd fma(Vd a, Vd b, Vd c) { return ::fma(a, b, c); }
RLIR_ANYWHERE static inline Vf select(bool mask, Vf a, Vf b) { return mask ? a : b; }

#else

#if defined(__AVX512F__)
static const Vi kLaneNumbers = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#elif defined(__AVX2__) && defined(__FMA__)
static const Vi kLaneNumbers = {0, 1, 2, 3, 4, 5, 6, 7};
#else
static const Vi kLaneNumbers = {0, 1, 2, 3};
#endif

static inline Vf splat(float x) { return x - Vf{}; }  // x - 0 is x, also for -0
static inline Vd splat(double x) { return x - Vd{}; }

static inline Vi as_int(Vf x) { return (Vi)x; }
static inline Vl as_int(Vd x) { return (Vl)x; }
static inline Vf as_real(Vi x) { return (Vf)x; }
static inline Vd as_real(Vl x) { return (Vd)x; }
static inline Vi shift_left(Vi x, int n) { return x << n; }
static inline Vl shift_left(Vl x, int n) { return x << n; }

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
static inline Vd fma(Vd a, Vd b, Vd c) {
#if defined(__AVX512F__)
  return (Vd)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(__AVX2__) && defined(__FMA__)
  return (Vd)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#else
  for (int i = 0; i < kWidth / 2; ++i) c[i] = __builtin_fma(a[i], b[i], c[i]);
  return c;
#endif
}

// `mask` has all bits set where `a` is taken.
static inline Vf select(Vi mask, Vf a, Vf b) { return mask ? a : b; }

static inline Vf max(Vf a, Vf b) { return select(a > b, a, b); }  // b where either is NaN

// One lane a byte. (The compiler's own conversion goes byte by byte; the unmasked intrinsics of
// AVX-512 make gcc 12 warn about its own header.)
template <typename T>
static inline typename Simd<T>::Int widen_bytes(const uint8_t* x) {
  using Int = typename Simd<T>::Int;
#if defined(__AVX512F__) || (defined(__AVX2__) && defined(__FMA__))
  __m128i bytes = {};
  __builtin_memcpy(&bytes, x, Simd<T>::kLanes);
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return (Int)_mm512_maskz_cvtepu8_epi32(0xffff, bytes);
  if constexpr (sizeof(T) == 8) return (Int)_mm512_maskz_cvtepu8_epi64(0xff, bytes);
#else
  if constexpr (sizeof(T) == 4) return (Int)_mm256_cvtepu8_epi32(bytes);
  if constexpr (sizeof(T) == 8) return (Int)_mm256_cvtepu8_epi64(bytes);
#endif
#else
  Int wide = {};
  for (int i = 0; i < Simd<T>::kLanes; ++i) wide[i] = x[i];
  return wide;
#endif
}

#endif  // RLIR_KERNEL_SOURCE

}  // namespace rlir
