// What a panel of queries sees of a block of keys, and the scores of what it does not see.
//
// Internal linkage: compiled once per instruction set.
#pragma once

#include "cpu/softmax.h"
#include "cpu/video_attention.h"
#include "cpu/words.h"

namespace rlir::cpu {
namespace {  // nothing here may be shared between instruction sets

inline int32_t clamped(int64_t x) {
  return static_cast<int32_t>(x < 0 ? 0 : x > INT32_MAX ? INT32_MAX : x);
}

struct PanelReach {
  int32_t low[kPanel], high[kPanel], own[kPanel], tau[kPanel];
  int64_t least_low, most_low, least_high, most_high, least_own;

  void set(int lane, const Reach& r) {
    low[lane] = clamped(r.low);
    high[lane] = clamped(r.high);
    own[lane] = clamped(r.own);
    tau[lane] = r.tau;
  }
  Reach of(int lane) const { return {low[lane], high[lane], own[lane], tau[lane]}; }

  // Extremes of the lanes that see something; the lanes beyond are as the last one.
  void finish(int lanes) {
    for (int i = lanes; i < kPanel; ++i) {
      low[i] = low[lanes - 1];
      high[i] = high[lanes - 1];
      own[i] = own[lanes - 1];
      tau[i] = tau[lanes - 1];
    }
    least_low = least_own = INT32_MAX;
    most_low = most_high = 0;
    least_high = INT32_MAX;
    for (int i = 0; i < lanes; ++i) {
      if (low[i] >= high[i]) {
        least_high = 0;  // then no block is seen by all
        continue;
      }
      least_low = low[i] < least_low ? low[i] : least_low;
      most_low = low[i] > most_low ? low[i] : most_low;
      least_high = high[i] < least_high ? high[i] : least_high;
      most_high = high[i] > most_high ? high[i] : most_high;
      least_own = own[i] < least_own ? own[i] : least_own;
    }
  }

  int64_t first_block() const { return least_low / kKeyBlock; }
  int64_t last_block() const { return (most_high + kKeyBlock - 1) / kKeyBlock; }  // exclusive
  bool seen_by_all(int64_t start, int64_t end) const {  // but for stand-ins
    return start >= most_low && end <= least_high && end <= least_own;
  }
};

inline bool any_lane(Vi x) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)x, (__m512i)x) != 0;
#else
  int32_t any = 0;
  for (int i = 0; i < kWidth; ++i) any |= x[i];
  return any != 0;
#endif
}

inline Vi load_ints(const int32_t* x) {
  Vi v;
  __builtin_memcpy(&v, x, sizeof v);
  return v;
}

inline Vi seen_lanes(const PanelReach& r, int i, int32_t slot, int32_t tau) {
  const Vi k = Vi{} + slot;
  const Vi inside = (load_ints(r.low + i) <= k) & (k < load_ints(r.high + i));
  return inside & ((k < load_ints(r.own + i)) | (load_ints(r.tau + i) >= Vi{} + tau));
}

// scores [count][kPanel] of slots `start` on: -infinity where not seen. seen[k]: by any lane.
template <bool kRefreshed>
inline void mask_slots(const AttentionMask& mask, const PanelReach& r, int64_t start, int64_t count,
                       int used, float* scores, bool* seen) {
  for (int64_t k = 0; k < count; ++k) {
    const int64_t slot = start + k;
    const int32_t tau = slot < r.least_own ? 0
                        : kRefreshed       ? steps_of(mask, slot).first
                                           : tau_of(mask, slot);
    Vi any = {};
    for (int i = 0; i < used * kWidth; i += kWidth) {
      const Vi inside = seen_lanes(r, i, static_cast<int32_t>(slot), tau);
      any |= inside;
      float* at = scores + k * kPanel + i;
      store_vector(at, select(inside, load_vector(at), splat(minus_infinity())));
    }
    seen[k] = any_lane(any);
  }
}

// One row of scores, of a stand-in's slot, which mask_slots may have masked. Returns whether any
// lane sees it.
inline bool mask_stand_in(const AttentionMask& mask, const PanelReach& r, int64_t slot, int used,
                          float* scores) {
  const Steps steps = steps_of(mask, slot);
  Vi any = {};
  for (int i = 0; i < used * kWidth; i += kWidth) {
    const Vi own = load_ints(r.own + i) <= Vi{} + static_cast<int32_t>(slot);
    const Vi inside = seen_lanes(r, i, static_cast<int32_t>(slot), steps.first) & own &
                      (load_ints(r.tau + i) < Vi{} + steps.end);
    any |= inside;
    store_vector(scores + i, select(inside, load_vector(scores + i), splat(minus_infinity())));
  }
  return any_lane(any);
}

// Whether all lanes see all slots of a block.
inline bool seen_by_all(const AttentionMask& mask, const PanelReach& r, int64_t start,
                        int64_t count) {
  return r.seen_by_all(start, start + count) &&
         (mask.kind != MaskKind::kRefreshed || next_stand_in(mask, start) >= start + count);
}

// Masks the scores of a block. Returns false if all lanes see all of it: then nothing was done.
inline bool mask_scores(const AttentionMask& mask, const PanelReach& r, int64_t start,
                        int64_t count, int used, float* scores, bool* seen) {
  if (seen_by_all(mask, r, start, count)) return false;
  const bool all = r.seen_by_all(start, start + count);
  if (mask.kind != MaskKind::kRefreshed) {
    mask_slots<false>(mask, r, start, count, used, scores, seen);
    return true;
  }
  if (all) {
    for (int64_t k = 0; k < count; ++k) seen[k] = true;
  } else {
    mask_slots<true>(mask, r, start, count, used, scores, seen);
  }
  int64_t stand_in = next_stand_in(mask, start);
  for (; stand_in < start + count; stand_in = next_stand_in(mask, stand_in + 1)) {
    const int64_t k = stand_in - start;
    seen[k] = mask_stand_in(mask, r, stand_in, used, scores + k * kPanel);
  }
  return true;
}

}  // namespace
}  // namespace rlir::cpu
