// Native vectors of float and double, with the operations that C++ has no operator for: fused
// multiply-add and the widening of bytes. The same bits on every instruction set: fused in hardware
// on AVX2 and AVX-512, by __builtin_fma on the baseline (slow and right).
//
// Everything has internal linkage ("static"), as in dtype.h: files compiled once per instruction
// set include this.
#pragma once

#include <stdint.h>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace rlir {

#if defined(__AVX512F__)
inline constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
inline constexpr int kVectorBytes = 32;
#else
inline constexpr int kVectorBytes = 16;
#endif

typedef float VectorF32 __attribute__((vector_size(kVectorBytes)));
typedef double VectorF64 __attribute__((vector_size(kVectorBytes)));
typedef int32_t VectorI32 __attribute__((vector_size(kVectorBytes)));
typedef int64_t VectorI64 __attribute__((vector_size(kVectorBytes)));

#if defined(__AVX512F__)
static inline VectorF32 fused(VectorF32 a, VectorF32 b, VectorF32 c) {
  return _mm512_fmadd_ps(a, b, c);
}
static inline VectorF64 fused(VectorF64 a, VectorF64 b, VectorF64 c) {
  return _mm512_fmadd_pd(a, b, c);
}
#elif defined(__FMA__)
static inline VectorF32 fused(VectorF32 a, VectorF32 b, VectorF32 c) {
  return _mm256_fmadd_ps(a, b, c);
}
static inline VectorF64 fused(VectorF64 a, VectorF64 b, VectorF64 c) {
  return _mm256_fmadd_pd(a, b, c);
}
#else
static inline VectorF32 fused(VectorF32 a, VectorF32 b, VectorF32 c) {
  VectorF32 r = {};
  for (int i = 0; i < 4; ++i) r[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return r;
}
static inline VectorF64 fused(VectorF64 a, VectorF64 b, VectorF64 c) {
  VectorF64 r = {};
  for (int i = 0; i < 2; ++i) r[i] = __builtin_fma(a[i], b[i], c[i]);
  return r;
}
#endif

template <typename T>
struct Simd;

template <>
struct Simd<float> {
  using Vector = VectorF32;
  using Int = VectorI32;
  using Word = int32_t;
  static constexpr int kLanes = kVectorBytes / 4;
};

template <>
struct Simd<double> {
  using Vector = VectorF64;
  using Int = VectorI64;
  using Word = int64_t;
  static constexpr int kLanes = kVectorBytes / 8;
};

template <typename T>
static inline typename Simd<T>::Vector splat(T x) {
  return x - typename Simd<T>::Vector{};  // x - 0 is x, also for -0
}

// One lane a byte. (The compiler's own conversion goes byte by byte; the unmasked intrinsics of
// AVX-512 make gcc 12 warn about its own header.)
template <typename T>
static inline typename Simd<T>::Int widen_bytes(const uint8_t* x) {
  using Int = typename Simd<T>::Int;
#if defined(__AVX2__)
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

}  // namespace rlir
