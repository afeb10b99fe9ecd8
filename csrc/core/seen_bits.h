// What a query sees (core/reach.h) as a bit a slot, for kernels that ask again in every layer.
#pragma once

#include <stdint.h>

#include <algorithm>

#include "core/reach.h"

namespace rlir {

// Bits begin .. end - 1.
inline void set_bits(uint64_t* bits, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end;) {
    const int64_t bit = i % 64, count = std::min(64 - bit, end - i);
    bits[i / 64] |= ~uint64_t{0} >> (64 - count) << bit;
    i += count;
  }
}

// bits [words]: bit i is whether the query sees slot base + i.
inline void seen_bits(const AttentionMask& m, const Reach& r, int64_t base, int64_t words,
                      uint64_t* bits) {
  std::fill_n(bits, words, uint64_t{0});
  const int64_t begin = std::max(r.low, base), end = std::min(r.high, base + 64 * words);
  if (begin >= end) return;
  const int64_t own = std::clamp(r.own, begin, end);
  set_bits(bits, begin - base, own - base);
  for (int64_t k = next_stand_in(m, begin); k < own; k = next_stand_in(m, k + 1)) {
    const int64_t i = k - base;
    if (!sees_slot(m, r, k)) bits[i / 64] &= ~(uint64_t{1} << i % 64);
  }
  for (int64_t k = own; k < end; ++k) {
    if (sees_slot(m, r, k)) set_bits(bits, k - base, k - base + 1);
  }
}

}  // namespace rlir
