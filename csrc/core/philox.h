// Counter-based random numbers: Philox 4x32-10 (Salmon et al., SC 2011) and normals made of them.
//
// A draw is a function of its key and counter alone. Here
//   key     = seed, low and high 32 bits
//   counter = (block, offset, row id low, row id high), 32 bits each
// so a row's numbers do not depend on the batch around it, and `offset` counts what a row draws at
// different times (steps). A block gives four words of 32 bits. Normals count blocks from 0 and
// tokens are drawn from the last one, which a row of less than 2^34 - 64 normals does not reach:
// one seed serves both.
//
// Included by files that are compiled once per instruction set, so everything here has internal
// linkage ("static"). Normals are plain arithmetic without branches, for loops that the compiler
// vectorises; without contraction (-ffp-contract=off, nvcc's -fmad=false) the bits are the same on
// every instruction set and in CUDA kernels.
#pragma once

#include <stdint.h>

#include "core/dtype.h"

#if defined(RLIR_KERNEL_SOURCE)
#include <math.h>
#elif defined(__SSE4_1__)
#include <immintrin.h>
#endif

namespace rlir {

struct PhiloxKey {
  uint32_t low, high;
};

struct PhiloxBlock {
  uint32_t a, b, c, d;
};

RLIR_ANYWHERE static inline PhiloxBlock philox_block(PhiloxBlock x, PhiloxKey key) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t p = static_cast<uint64_t>(x.a) * 0xd2511f53u;
    const uint64_t q = static_cast<uint64_t>(x.c) * 0xcd9e8d57u;
    x = {static_cast<uint32_t>(q >> 32) ^ x.b ^ key.low, static_cast<uint32_t>(q),
         static_cast<uint32_t>(p >> 32) ^ x.d ^ key.high, static_cast<uint32_t>(p)};
    key.low += 0x9e3779b9u;
    key.high += 0xbb67ae85u;
  }
  return x;
}

inline constexpr uint32_t kDrawBlock = 0xffffffffu;

// The 64 bit fraction a row draws with: words 0 and 1 (the upper) of the last block.
RLIR_ANYWHERE static inline uint64_t philox_fraction(uint32_t offset, uint64_t row, PhiloxKey key) {
  const PhiloxBlock x = philox_block(
      {kDrawBlock, offset, static_cast<uint32_t>(row), static_cast<uint32_t>(row >> 32)}, key);
  return static_cast<uint64_t>(x.b) << 32 | x.a;
}

// Natural logarithm of u in [2^-32, 1], to about an ulp (polynomial of the Cephes library).
RLIR_ANYWHERE static inline float log_unit(float u) {
  const int32_t bits = __builtin_bit_cast(int32_t, u);
  const int32_t exponent = (bits - 0x3f3504f3) >> 23;  // of a mantissa in [sqrt(1/2), sqrt(2))
  const float f = __builtin_bit_cast(float, bits - exponent * (1 << 23)) - 1.0f;
  const float e = static_cast<float>(exponent), z = f * f;
  float p = 7.0376836292e-2f;
  p = p * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  const float y = (p * f * z - 2.12194440e-4f * e) - 0.5f * z;
  return (f + y) + 0.693359375f * e;
}

RLIR_ANYWHERE static inline float root(float x) {
#if defined(__CUDACC__)
  return sqrtf(x);
#else
  return __builtin_sqrtf(x);
#endif
}

struct NormalPair {
  float a, b;
};

// Two independent standard normals from two words (Box-Muller):
//   u = (m + 1/2) 2^-31 in float, m = first >> 1;  r = sqrt(-2 log u)
//   r cos(2 pi second 2^-32), r sin(2 pi second 2^-32)
// The angle is reduced to an eighth of a turn in integers, which is exact.
RLIR_ANYWHERE static inline NormalPair normal_pair(uint32_t first, uint32_t second) {
  const float u = static_cast<float>(static_cast<int32_t>(first >> 1)) * 0x1p-31f + 0x1p-32f;
  const float r = root(-2.0f * log_unit(u));
  const uint32_t turned = second + 0x20000000u, quadrant = turned >> 30;
  const int32_t rest = static_cast<int32_t>(turned & 0x3fffffffu) - 0x20000000;
  const float x = static_cast<float>(rest) * 1.46291807926715968e-9f, z = x * x;  // 2 pi 2^-32
  const float s = ((-1.9515295891e-4f * z + 8.3321608736e-3f) * z - 1.6666654611e-1f) * z * x + x;
  const float c =
      ((2.443315711809948e-5f * z - 1.388731625493765e-3f) * z + 4.166664568298827e-2f) * z * z -
      0.5f * z + 1.0f;
  const uint32_t odd = 0u - (quadrant & 1u);
  const uint32_t sine = __builtin_bit_cast(uint32_t, s), cosine = __builtin_bit_cast(uint32_t, c);
  const uint32_t along = (cosine & ~odd) | (sine & odd), across = (sine & ~odd) | (cosine & odd);
  return {r * __builtin_bit_cast(float, along ^ (((quadrant + 1u) & 2u) << 30)),
          r * __builtin_bit_cast(float, across ^ ((quadrant & 2u) << 30))};
}

// Normals of elements [64 tile, 64 tile + 64) of a row. Element e of the tile is number e / 16 of
// block 16 tile + e % 16: blocks lie side by side, so that vectors are written as they are made.
inline constexpr int64_t kNormalTile = 64;

#if !defined(RLIR_KERNEL_SOURCE)

// Words of as many blocks as a register holds, in the low halves of 64 bit lanes: that is how the
// processor multiplies. The high halves hold anything.
#if defined(__AVX512F__)
inline constexpr int kPhiloxGroup = 8;
typedef uint64_t PhiloxLanes __attribute__((vector_size(64)));
static inline PhiloxLanes multiply_low(PhiloxLanes x, PhiloxLanes y) {
  return reinterpret_cast<PhiloxLanes>(
      _mm512_maskz_mul_epu32(0xff, reinterpret_cast<__m512i>(x), reinterpret_cast<__m512i>(y)));
}
#elif defined(__AVX2__)
inline constexpr int kPhiloxGroup = 4;
typedef uint64_t PhiloxLanes __attribute__((vector_size(32)));
static inline PhiloxLanes multiply_low(PhiloxLanes x, PhiloxLanes y) {
  return reinterpret_cast<PhiloxLanes>(
      _mm256_mul_epu32(reinterpret_cast<__m256i>(x), reinterpret_cast<__m256i>(y)));
}
#elif defined(__SSE4_1__)
inline constexpr int kPhiloxGroup = 2;
typedef uint64_t PhiloxLanes __attribute__((vector_size(16)));
static inline PhiloxLanes multiply_low(PhiloxLanes x, PhiloxLanes y) {
  return reinterpret_cast<PhiloxLanes>(
      _mm_mul_epu32(reinterpret_cast<__m128i>(x), reinterpret_cast<__m128i>(y)));
}
#else
inline constexpr int kPhiloxGroup = 2;
typedef uint64_t PhiloxLanes __attribute__((vector_size(16)));
static inline PhiloxLanes multiply_low(PhiloxLanes x, PhiloxLanes y) {
  return (x & 0xffffffffu) * (y & 0xffffffffu);
}
#endif

struct PhiloxWords {
  PhiloxLanes a, b, c, d;
};

// The keys of the rounds, made once for many tiles: vectors read them from memory as they need
// them.
struct PhiloxSchedule {
  uint64_t low[10], high[10];

  explicit PhiloxSchedule(PhiloxKey key) {
    for (int round = 0; round < 10; ++round) {
      low[round] = key.low;
      high[round] = key.high;
      key.low += 0x9e3779b9u;
      key.high += 0xbb67ae85u;
    }
  }
};

// Two groups by turns: the rounds of one alone would wait for their multiplications.
inline constexpr int kPhiloxPair = 2 * kPhiloxGroup;

static inline void philox(PhiloxWords (&words)[2], const PhiloxSchedule& key) {
  const PhiloxLanes zero = {};
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
#pragma GCC unroll 2
    for (PhiloxWords& x : words) {
      const PhiloxLanes p = multiply_low(x.a, zero + 0xd2511f53u);
      const PhiloxLanes q = multiply_low(x.c, zero + 0xcd9e8d57u);
      x = {(q >> 32) ^ x.b ^ key.low[round], q, (p >> 32) ^ x.d ^ key.high[round], p};
    }
  }
}

static inline void normal_tile(float* out, uint32_t tile, uint32_t offset, uint64_t row,
                               const PhiloxSchedule& key) {
  uint32_t words[4][16];
  const PhiloxLanes zero = {};
  PhiloxLanes count = {};
  for (int l = 0; l < kPhiloxGroup; ++l) count[l] = static_cast<uint64_t>(l);
  for (int first = 0; first < 16; first += kPhiloxPair) {
    const PhiloxWords start = {zero, zero + offset, zero + (row & 0xffffffffu), zero + (row >> 32)};
    PhiloxWords x[2] = {start, start};
    x[0].a = count + (tile * 16u + static_cast<uint32_t>(first));
    x[1].a = x[0].a + kPhiloxGroup;
    philox(x, key);
    for (int l = 0; l < kPhiloxPair; ++l) {
      const PhiloxWords& from = x[l / kPhiloxGroup];
      words[0][first + l] = static_cast<uint32_t>(from.a[l % kPhiloxGroup]);
      words[1][first + l] = static_cast<uint32_t>(from.b[l % kPhiloxGroup]);
      words[2][first + l] = static_cast<uint32_t>(from.c[l % kPhiloxGroup]);
      words[3][first + l] = static_cast<uint32_t>(from.d[l % kPhiloxGroup]);
    }
  }
  for (int pair = 0; pair < 2; ++pair) {
    for (int l = 0; l < 16; ++l) {
      const NormalPair z = normal_pair(words[2 * pair][l], words[2 * pair + 1][l]);
      out[32 * pair + l] = z.a;
      out[32 * pair + 16 + l] = z.b;
    }
  }
}

#endif  // RLIR_KERNEL_SOURCE

}  // namespace rlir
