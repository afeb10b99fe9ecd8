// Rows of float32 or bfloat16 as vectors of floats, for kernels that go through a row once.
//
// Internal linkage: compiled once per instruction set.
#pragma once

#include "core/dtype.h"
#include "core/simd.h"

namespace rlir::cpu {
namespace {  // nothing here may be shared between instruction sets

// kWidth elements from x[at] on.
inline Vf load_values(const void* x, Dtype dtype, int64_t at) {
  if (dtype == Dtype::kFloat32) return load_vector(static_cast<const float*>(x) + at);
  Vi bits;
  const BFloat16* from = static_cast<const BFloat16*>(x) + at;
#if defined(__AVX512F__)
  __m256i half;
  __builtin_memcpy(&half, from, sizeof half);
  bits = (Vi)_mm512_maskz_slli_epi32(0xffff, _mm512_maskz_cvtepu16_epi32(0xffff, half), 16);
#elif defined(__AVX2__) && defined(__FMA__)
  __m128i half;
  __builtin_memcpy(&half, from, sizeof half);
  bits = (Vi)_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16);
#else
  for (int i = 0; i < kWidth; ++i) bits[i] = static_cast<int32_t>(uint32_t{from[i].bits} << 16);
#endif
  return (Vf)bits;
}

// The nearest bfloat16, ties to even; NaN stays NaN.
inline void store_values(void* x, Dtype dtype, int64_t at, Vf value) {
  if (dtype == Dtype::kFloat32) return store_vector(static_cast<float*>(x) + at, value);
  typedef uint32_t Vu __attribute__((vector_size(kWidth * 4)));
  const Vu bits = (Vu)value;
  const Vu rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Vu out = (bits & 0x7fffffffu) > 0x7f800000u ? Vu{} + 0x7fc0u : rounded;
  BFloat16* to = static_cast<BFloat16*>(x) + at;
#if defined(__AVX512F__)
  const __m256i half = _mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)out);
  __builtin_memcpy(to, &half, sizeof half);
#else
  for (int i = 0; i < kWidth; ++i) to[i].bits = static_cast<uint16_t>(out[i]);
#endif
}

inline float value_of(const void* x, Dtype dtype, int64_t at) {
  return dtype == Dtype::kFloat32 ? static_cast<const float*>(x)[at]
                                  : static_cast<float>(load(static_cast<const BFloat16*>(x) + at));
}

// A row of n as floats, zeros up to a whole group of 16.
inline void load_row(float* to, const void* x, Dtype dtype, int64_t at, int64_t n) {
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) store_vector(to + i, load_values(x, dtype, at + i));
  for (; i < n; ++i) to[i] = value_of(x, dtype, at + i);
  for (; i % 16 != 0; ++i) to[i] = 0.0f;
}

inline void store_row(void* x, Dtype dtype, int64_t at, const float* from, int64_t n) {
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) store_values(x, dtype, at + i, load_vector(from + i));
  for (; i < n; ++i) {
    if (dtype == Dtype::kFloat32) {
      static_cast<float*>(x)[at + i] = from[i];
    } else {
      store(static_cast<BFloat16*>(x) + at + i, static_cast<double>(from[i]));
    }
  }
}

}  // namespace
}  // namespace rlir::cpu
