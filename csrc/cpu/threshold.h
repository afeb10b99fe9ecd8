// The search behind cpu/truncation.h: at which value of a row a weight is reached.
//
// The row is weighed above three thresholds at a time, the values between the two that enclose the
// answer are kept, and the search goes on with those: the second pass sees a fraction of the row.
//
// Internal linkage: compiled once per instruction set.
#pragma once

#include "cpu/product.h"
#include "cpu/softmax.h"

namespace rlir::cpu {
namespace {  // nothing here may be shared between instruction sets

// In the support: z > threshold, or z == threshold and token <= last.
struct Cut {
  float threshold;
  int32_t last;
};

// Work space of a row of V tokens; arrays are padded to whole blocks.
struct RowSearch {
  float *e, *mass;            // exp(z - m_b), and its share of exp(m) in multiples of 2^-32
  float *rest_z, *rest_mass;  // candidates of a search
  float *block_max, *factor;  // [blocks]: m_b and exp(m_b - m), and room for a vector more
  double* total;              // of all masses
};

// Tokens low .. high - 1 widened to whole blocks; z is -infinity elsewhere.
struct Span {
  int64_t begin, end;
};

// Exact sums of masses: kWidth doubles, as two registers or more.
typedef double HalfWide __attribute__((vector_size(kWidth * 4)));
typedef float HalfVector __attribute__((vector_size(kWidth * 2)));

struct MassSum {
  HalfWide low = {}, high = {};

  void add(Vf v) {
    struct Halves {
      HalfVector low, high;
    };
    const Halves h = __builtin_bit_cast(Halves, v);
    low += __builtin_convertvector(h.low, HalfWide);
    high += __builtin_convertvector(h.high, HalfWide);
  }

  double total() const {  // exact, so in any order
    const HalfWide both = low + high;
    double sum = 0.0;
    for (int i = 0; i < kWidth / 2; ++i) sum += both[i];
    return sum;
  }
};

// Integers in the order of floats.
inline int64_t key_of(float x) {
  const int32_t bits = __builtin_bit_cast(int32_t, x);
  return bits < 0 ? bits ^ 0x7fffffff : bits;
}

inline float value_of(int64_t key) {
  const int32_t bits = static_cast<int32_t>(key);
  return __builtin_bit_cast(float, bits < 0 ? bits ^ 0x7fffffff : bits);
}

// Weight of the values at or above each of three thresholds, ascending.
template <bool kCount>
inline void weigh(const float* z, const float* mass, int64_t n, const float* threshold,
                  double* weight) {
#if defined(__AVX512F__)
  const __m512 q0 = _mm512_set1_ps(threshold[0]), q1 = _mm512_set1_ps(threshold[1]),
               q2 = _mm512_set1_ps(threshold[2]);
  if constexpr (kCount) {
    int64_t count[3] = {};
    for (int64_t i = 0; i < n; i += kWidth) {
      const __m512 x = _mm512_loadu_ps(z + i);
      count[0] += __builtin_popcount(_mm512_cmp_ps_mask(x, q0, _CMP_GE_OQ));
      count[1] += __builtin_popcount(_mm512_cmp_ps_mask(x, q1, _CMP_GE_OQ));
      count[2] += __builtin_popcount(_mm512_cmp_ps_mask(x, q2, _CMP_GE_OQ));
    }
    for (int i = 0; i < 3; ++i) weight[i] = static_cast<double>(count[i]);
  } else {
    __m512d a0 = {}, a1 = {}, a2 = {}, b0 = {}, b1 = {}, b2 = {};
    for (int64_t i = 0; i < n; i += kWidth) {
      const __m512 x = _mm512_loadu_ps(z + i), w = _mm512_loadu_ps(mass + i);
      const __m512d a = _mm512_cvtps_pd(_mm512_castps512_ps256(w));
      const __m512d b = _mm512_cvtps_pd(_mm512_extractf32x8_ps(w, 1));
      const __mmask16 k0 = _mm512_cmp_ps_mask(x, q0, _CMP_GE_OQ);
      const __mmask16 k1 = _mm512_cmp_ps_mask(x, q1, _CMP_GE_OQ);
      const __mmask16 k2 = _mm512_cmp_ps_mask(x, q2, _CMP_GE_OQ);
      a0 = _mm512_mask_add_pd(a0, static_cast<__mmask8>(k0), a0, a);
      b0 = _mm512_mask_add_pd(b0, static_cast<__mmask8>(k0 >> 8), b0, b);
      a1 = _mm512_mask_add_pd(a1, static_cast<__mmask8>(k1), a1, a);
      b1 = _mm512_mask_add_pd(b1, static_cast<__mmask8>(k1 >> 8), b1, b);
      a2 = _mm512_mask_add_pd(a2, static_cast<__mmask8>(k2), a2, a);
      b2 = _mm512_mask_add_pd(b2, static_cast<__mmask8>(k2 >> 8), b2, b);
    }
    weight[0] = _mm512_reduce_add_pd(_mm512_add_pd(a0, b0));
    weight[1] = _mm512_reduce_add_pd(_mm512_add_pd(a1, b1));
    weight[2] = _mm512_reduce_add_pd(_mm512_add_pd(a2, b2));
  }
#else
  for (int t = 0; t < 3; ++t) {
    const Vf q = splat(threshold[t]);
    if constexpr (kCount) {
      Vi count = {};
      for (int64_t i = 0; i < n; i += kWidth) count -= load_vector(z + i) >= q;
      int64_t all = 0;
      for (int i = 0; i < kWidth; ++i) all += count[i];
      weight[t] = static_cast<double>(all);
    } else {
      MassSum sum;
      for (int64_t i = 0; i < n; i += kWidth) {
        sum.add(select(load_vector(z + i) >= q, load_vector(mass + i), Vf{}));
      }
      weight[t] = sum.total();
    }
  }
#endif
}

// Moves values in [low, high) to the front of `out`, with their masses; pads to a whole vector.
// `out` may be the source.
inline int64_t keep_between(const float* z, const float* mass, int64_t n, float low, float high,
                            float* out_z, float* out_mass) {
  int64_t kept = 0;
#if defined(__AVX512F__)
  const __m512 below = _mm512_set1_ps(low), above = _mm512_set1_ps(high);
  for (int64_t i = 0; i < n; i += kWidth) {
    const __m512 x = _mm512_loadu_ps(z + i), w = _mm512_loadu_ps(mass + i);
    const __mmask16 k =
        _mm512_mask_cmp_ps_mask(_mm512_cmp_ps_mask(x, below, _CMP_GE_OQ), x, above, _CMP_LT_OQ);
    _mm512_storeu_ps(out_z + kept, _mm512_maskz_compress_ps(k, x));
    _mm512_storeu_ps(out_mass + kept, _mm512_maskz_compress_ps(k, w));
    kept += __builtin_popcount(k);
  }
#else
  for (int64_t i = 0; i < n; ++i) {
    const float x = z[i], w = mass[i];
    out_z[kept] = x;
    out_mass[kept] = w;
    kept += x >= low && x < high ? 1 : 0;
  }
#endif
  for (int64_t i = kept; i < round_up(kept, kWidth); ++i) {
    out_z[i] = minus_infinity();
    out_mass[i] = 0.0f;
  }
  return kept;
}

// A value and the weight of what is larger.
struct Threshold {
  float z;
  double above;
};

// Few candidates: takes the largest values one after another until the weight reaches the target.
template <bool kCount>
inline Threshold settle(float* z, const float* mass, int64_t n, double above, double target) {
  Threshold found = {minus_infinity(), above};
  while (true) {
    float best = minus_infinity();
    for (int64_t i = 0; i < n; ++i) best = z[i] > best ? z[i] : best;
    if (best == minus_infinity()) return found;
    found = {best, above};
    for (int64_t i = 0; i < n; ++i) {
      if (z[i] == best) {
        above += kCount ? 1.0 : static_cast<double>(mass[i]);
        z[i] = minus_infinity();
      }
    }
    if (above >= target) return found;
  }
}

// The z of which the weight above falls short of `target` and the weight at or above does not;
// the smallest if all weight falls short. `guess` is where to look first.
template <bool kCount>
inline Threshold find_threshold(const RowSearch& s, const float* z, const float* mass, int64_t n,
                                float maximum, float guess, double target) {
  constexpr int64_t kFew = 32;
  const int64_t lowest = key_of(minus_infinity()) + 1;
  // The answer is in [low, high). A maximum of -0 becomes 0, for no value lies between the two.
  int64_t low = lowest, high = key_of(maximum + 0.0f) + 1;
  double above = 0.0;  // weight at or above `high`
  float step = 1.0f;
  for (int round = 0; high - low > 1; ++round) {
    float q[3];
    int64_t key[3];
    const float low_value = value_of(low), high_value = value_of(high);
    for (int i = 0; i < 3; ++i) {
      const float part = 0.25f * static_cast<float>(i + 1);
      if (round == 0) {
        q[i] = guess + static_cast<float>(i - 1);
      } else if (round >= 8) {  // values did not do: halve bits
        q[i] = value_of(low + (high - low) * (i + 1) / 4);
      } else if (low == lowest) {
        q[i] = high_value - step * static_cast<float>(4 >> i);
      } else {
        q[i] = low_value + (high_value - low_value) * part;
      }
      key[i] = key_of(q[i]);  // kept inside of the interval, whatever rounding did
      if (!(key[i] > low)) key[i] = low + 1;
      if (key[i] > high - 1) key[i] = high - 1;
      q[i] = value_of(key[i]);
    }
    if (low == lowest) step *= 8.0f;
    double weight[3];
    weigh<kCount>(z, mass, n, q, weight);
    int at = 2;  // the highest threshold that reaches the target
    while (at >= 0 && !(above + weight[at] >= target)) --at;
    if (at < 2) {
      high = key[at + 1];
      above += weight[at + 1];
    }
    if (at >= 0) low = key[at];
    n = keep_between(z, mass, n, value_of(low), value_of(high), s.rest_z, s.rest_mass);
    z = s.rest_z;
    mass = s.rest_mass;
    if (n <= kFew) return settle<kCount>(s.rest_z, mass, n, above, target);
    n = round_up(n, kWidth);
  }
  return {value_of(low) + 0.0f, above};  // + 0: -0 and 0 are one value
}

// The cut at a threshold: walks its ties in the order of tokens until the weight is reached.
template <bool kCount>
inline Cut cut_at(const float* z, const float* mass, const Span& span, const Threshold& threshold,
                  double target) {
  double weight = threshold.above;
  Cut cut = {threshold.z, -1};
  for (int64_t v = span.begin; v < span.end; v += kWidth) {
    const Vi equal = load_vector(z + v) == splat(threshold.z);
    int any = 0;
    for (int i = 0; i < kWidth; ++i) any |= equal[i];
    if (any == 0) continue;
    for (int i = 0; i < kWidth; ++i) {
      if (equal[i] == 0) continue;
      cut.last = static_cast<int32_t>(v) + i;
      weight += kCount ? 1.0 : static_cast<double>(mass[v + i]);
      if (weight >= target) return cut;
    }
  }
  return cut;
}

}  // namespace
}  // namespace rlir::cpu
