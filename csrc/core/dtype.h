// Number formats that kernels read and write, and conversions of the 16 bit ones.
//
// Included by files that are compiled once per instruction set, so everything here has internal
// linkage ("static"): an inline function with external linkage would leave one copy per
// instruction set and the linker would keep any of them, such as the AVX-512 one on an old CPU.
// CUDA kernels use them too: the same bits.
#pragma once

#include <stdint.h>

#if defined(__CUDACC__)
#define RLIR_ANYWHERE __host__ __device__
#else
#define RLIR_ANYWHERE
#endif
// In a source of CUDA kernels, whether nvcc compiles it or the emulator's compiler: a thread works
// on single numbers.
#if defined(__CUDACC__) || defined(RLIR_EMU)
#define RLIR_KERNEL_SOURCE
#endif

namespace rlir {

enum class Dtype : int32_t { kFloat64, kFloat32, kBFloat16, kFloat16 };

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

RLIR_ANYWHERE static inline double load(const double* x) { return *x; }
RLIR_ANYWHERE static inline double load(const float* x) { return *x; }

RLIR_ANYWHERE static inline double load(const BFloat16* x) {
  return __builtin_bit_cast(float, static_cast<uint32_t>(x->bits) << 16);
}

RLIR_ANYWHERE static inline double load(const Float16* x) {
  const uint32_t magnitude = x->bits & 0x7fffu, exponent = magnitude >> 10;
  float value;
  if (exponent == 0) {
    value = static_cast<float>(magnitude) * 0x1p-24f;  // subnormal here, normal as float
  } else if (exponent == 31) {
    value = __builtin_bit_cast(float, 0x7f800000u | (magnitude << 13));  // infinity, NaN
  } else {
    value = __builtin_bit_cast(float, (magnitude << 13) + (112u << 23));  // bias 15 to 127
  }
  return (x->bits & 0x8000u) != 0 ? -value : value;
}

// Stores round to nearest, ties to even. The 16 bit formats round twice, by way of float.
RLIR_ANYWHERE static inline void store(double* out, double value) { *out = value; }
RLIR_ANYWHERE static inline void store(float* out, double value) {
  *out = static_cast<float>(value);
}

RLIR_ANYWHERE static inline void store(BFloat16* out, double value) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, static_cast<float>(value));
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  out->bits = static_cast<uint16_t>(nan ? 0x7fc0u : rounded);
}

RLIR_ANYWHERE static inline void store(Float16* out, double value) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, static_cast<float>(value));
  const uint32_t sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;                       // NaN
  } else if (magnitude >= 0x47800000u) {  // 65536 and up
    half = 0x7c00u;                       // infinity; 65520 to 65536 get there by rounding
  } else if (magnitude < 0x38800000u) {   // below 2^-14: a float near 0.5 has steps of 2^-24
    const float shifted = __builtin_bit_cast(float, magnitude) + 0.5f;
    half = __builtin_bit_cast(uint32_t, shifted) - 0x3f000000u;
  } else {
    half = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
  }
  out->bits = static_cast<uint16_t>(sign | half);
}

}  // namespace rlir
