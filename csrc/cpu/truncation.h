// Which tokens of a row top_k, top_p and min_p leave, without sorting the row.
//
// In this order, as transformers' processors: top_k keeps the k largest z; top_p, of those, the
// smallest set of the largest whose mass is at least p of theirs; min_p, of those, what has at
// least min_p of the largest probability. Among equal z the lower token comes first. So a support
// is a threshold and, for tokens that are equal to it, the last one that is in: a `Cut`.
//
// Masses are exact. A token's mass is exp(z - m), rounded to a multiple of 2^-32; a double holds
// the sum of 2^21 of them without rounding, so that the order of addition, and with it
// the instruction set, has no influence. (A token less likely than 2^-33 of the largest has mass
// 0: it can be in the support and is never drawn.)
//
// Internal linkage: compiled once per instruction set.
#pragma once

#include "cpu/threshold.h"

namespace rlir::cpu {
namespace {  // nothing here may be shared between instruction sets

constexpr int64_t kMaxTokens = int64_t{1} << 21;
constexpr double kMassUnit = 0x1p-32;

struct Truncation {
  int64_t top_k;  // 0: none
  double top_p;   // 1: none
  double min_p;   // 0: none
};

inline int64_t padded_tokens(int64_t tokens) { return round_up(tokens, kSoftmaxBlock); }

inline int64_t row_search_bytes(int64_t tokens) {
  const int64_t padded = padded_tokens(tokens);
  return 4 * (4 * padded + 2 * round_up(padded / kSoftmaxBlock + 16, 16)) + 64;
}

inline RowSearch row_search(float* space, int64_t tokens) {
  const int64_t padded = padded_tokens(tokens), blocks = round_up(padded / kSoftmaxBlock + 16, 16);
  float* after = space + 4 * padded;
  return {space,
          space + padded,
          space + 2 * padded,
          space + 3 * padded,
          after,
          after + blocks,
          reinterpret_cast<double*>(after + 2 * blocks)};
}

inline float max_of(Vf v) {
  float m = v[0];
  for (int i = 1; i < kWidth; ++i) m = v[i] > m ? v[i] : m;
  return m;
}

inline Span span_of(int64_t low, int64_t high) {
  return {low / kSoftmaxBlock * kSoftmaxBlock, round_up(high, kSoftmaxBlock)};
}

// Fills e, mass, block_max, factor and total of a row; returns its maximum.
inline float row_exponentials(const RowSearch& s, const float* z, int64_t low, int64_t high) {
  const Span span = span_of(low, high);
  const int64_t first = span.begin / kSoftmaxBlock, last = span.end / kSoftmaxBlock;
  Vf row_max = splat(minus_infinity());
  for (int64_t b = first; b < last; ++b) {
    Vf m = splat(minus_infinity());
    for (int64_t i = 0; i < kSoftmaxBlock; i += kWidth) {
      m = max(load_vector(z + b * kSoftmaxBlock + i), m);
    }
    s.block_max[b] = max_of(m);
    row_max = max(m, row_max);
  }
  const float maximum = max_of(row_max);
  for (int64_t b = first; b < last; ++b) {
    s.factor[b] = s.block_max[b] == minus_infinity() ? 0.0f : s.block_max[b] - maximum;
  }
  for (int64_t b = first; b < last; b += kWidth) {  // past the end is space that nobody reads
    store_vector(s.factor + b, exp(load_vector(s.factor + b)));
  }
  MassSum total;
  for (int64_t b = first; b < last; ++b) {
    const Vf reference = reference_of(splat(s.block_max[b])), factor = splat(s.factor[b]);
    const Vf unit = splat(0x1p-9f);  // whose last bit is 2^-32
    for (int64_t i = b * kSoftmaxBlock; i < (b + 1) * kSoftmaxBlock; i += kWidth) {
      const Vf e = exp(load_vector(z + i) - reference);
      store_vector(s.e + i, e);
      const Vf mass = e * factor;
      const Vf exact = select(mass < unit, (mass + unit) - unit, mass);
      store_vector(s.mass + i, exact);
      total.add(exact);
    }
  }
  *s.total = total.total();
  return maximum;
}

inline Vi in_cut(const Cut& cut, Vf z, int64_t token) {
  const Vi at = kLaneNumbers + static_cast<int32_t>(token);
  const Vf threshold = splat(cut.threshold);
  return (z > threshold) | ((z == threshold) & (at <= (Vi{} + cut.last)));
}

// The support of a row whose e and mass are there. Masses outside of top_k become 0.
inline Cut row_cut(const RowSearch& s, const float* z, float maximum, int64_t low, int64_t high,
                   const Truncation& t) {
  const Span span = span_of(low, high);
  const int64_t n = span.end - span.begin;
  Cut cut = {minus_infinity(), -1};
  double total = *s.total;
  if (t.top_k > 0 && t.top_k < high - low) {
    const double k = static_cast<double>(t.top_k);
    const Threshold at =
        find_threshold<true>(s, z + span.begin, s.mass + span.begin, n, maximum, maximum - 2.0f, k);
    if (at.z > minus_infinity()) {
      cut = cut_at<true>(z, s.mass, span, at, k);
      MassSum left;
      for (int64_t v = span.begin; v < span.end; v += kWidth) {
        const Vf mass = select(in_cut(cut, load_vector(z + v), v), load_vector(s.mass + v), Vf{});
        store_vector(s.mass + v, mass);
        left.add(mass);
      }
      total = left.total();
    }
  }
  if (t.top_p < 1.0) {
    const double target = t.top_p * total;
    // Where a token has the mean mass: the threshold is not far from it.
    const double mean = total / static_cast<double>(n);
    const float guess = maximum + static_cast<float>(log(mean > 0.0 ? mean : 1.0));
    const Threshold at =
        find_threshold<false>(s, z + span.begin, s.mass + span.begin, n, maximum, guess, target);
    if (at.z > minus_infinity()) cut = cut_at<false>(z, s.mass, span, at, target);
  }
  if (t.min_p > 0.0) {
    const float at = static_cast<float>(static_cast<double>(maximum) + log(t.min_p));
    if (at > cut.threshold) cut = {at, 0x7fffffff};
  }
  return cut;
}

// Bits of kWidth tokens, the lowest token in the lowest bit.
inline uint32_t bits_of(Vi mask) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask((__m512i)mask);
#elif defined(__AVX2__) && defined(__FMA__)
  return static_cast<uint32_t>(_mm256_movemask_ps((__m256)mask));
#else
  uint32_t bits = 0;
  for (int i = 0; i < kWidth; ++i) bits |= static_cast<uint32_t>(mask[i] & 1) << i;
  return bits;
#endif
}

// Bit v % 8 of byte v / 8 of `support`, ceil(tokens / 8) bytes.
inline void write_support(const float* z, const Cut& cut, int64_t low, int64_t high, int64_t tokens,
                          uint8_t* support) {
  const int64_t bytes = (tokens + 7) / 8;
  __builtin_memset(support, 0, static_cast<uint64_t>(bytes));
  const Span span = span_of(low, high);
  for (int64_t v = span.begin; v < span.end; v += 16) {
    uint32_t bits = 0;
    for (int i = 0; i < 16; i += kWidth) {
      bits |= bits_of(in_cut(cut, load_vector(z + v + i), v + i)) << i;
    }
    if (v / 8 < bytes) support[v / 8] = static_cast<uint8_t>(bits);
    if (v / 8 + 1 < bytes) support[v / 8 + 1] = static_cast<uint8_t>(bits >> 8);
  }
}

}  // namespace
}  // namespace rlir::cpu
