// What attention is made of where key slots are the lanes of vectors, and a query has a row of
// scores: its softmax over a block, and the values. For the rollout engine's own slots
// (cpu/cache_attention.h) and for panels of few queries (cpu/attention_few.h). Order and bits:
// cpu/video_attention.h.
//
// Internal linkage: compiled once per instruction set.
#pragma once

#include "core/exp2.h"
#include "cpu/softmax.h"
#include "cpu/video_attention.h"
#include "cpu/words.h"

namespace rlir::cpu {
namespace {  // nothing here may be shared between instruction sets

constexpr int kValueVectors = 4;  // vectors of d at a time
constexpr int64_t kScoreRow = kKeyBlock;

template <int kVectors16>
inline void ask_for(const void* x) {  // whole lines of 64 bytes
#pragma GCC unroll 4
  for (int i = 0; i < kVectors16; ++i) {
    __builtin_prefetch(static_cast<const char*>(x) + 64 * i, 0, 2);
  }
}

template <typename F, int kQueries, int kUsed, bool kAsks>
__attribute__((noinline)) void value_lanes(float* const* out,
                                           const typename F::Word* const* weights,
                                           const typename F::Word* v, const typename F::Word* next,
                                           int64_t words, int64_t stride) {
  Vf sums[kQueries][kUsed];
#pragma GCC unroll 4
  for (int j = 0; j < kQueries; ++j) {
#pragma GCC unroll 4
    for (int i = 0; i < kUsed; ++i) sums[j][i] = load_vector(out[j] + i * kWidth);
  }
  for (int64_t w = 0; w < words; ++w) {
    typename F::Lanes lanes[kUsed];
    if constexpr (kAsks) ask_for<(kUsed + kPer16 - 1) / kPer16>(next + w * stride);
#pragma GCC unroll 4
    for (int i = 0; i < kUsed; ++i) lanes[i] = F::load_lanes(v + w * stride + i * kWidth);
#pragma GCC unroll 4
    for (int j = 0; j < kQueries; ++j) {
      const typename F::Lanes value = F::broadcast(weights[j] + w);
#pragma GCC unroll 4
      for (int i = 0; i < kUsed; ++i) sums[j][i] = F::multiply_add(lanes[i], value, sums[j][i]);
    }
  }
#pragma GCC unroll 4
  for (int j = 0; j < kQueries; ++j) {
#pragma GCC unroll 4
    for (int i = 0; i < kUsed; ++i) store_vector(out[j] + i * kWidth, sums[j][i]);
  }
}

// out[j][0 .. stride) += weights[j] v, a chain over `words` words of positions. What is at
// `next_values` is asked for meanwhile, if kAsks.
template <typename F, int kQueries, bool kAsks = true>
inline void add_values(float* const* out, const typename F::Word* const* weights,
                       const typename F::Word* values, const typename F::Word* next_values,
                       int64_t words, int64_t stride) {
  for (int64_t lane = 0; lane < stride; lane += kValueVectors * kWidth) {
    float* at[kQueries];
    for (int j = 0; j < kQueries; ++j) at[j] = out[j] + lane;
    const auto *v = values + lane, *next = next_values + lane;
    switch (at_most((stride - lane) / kWidth, kValueVectors)) {
      case 4:
        value_lanes<F, kQueries, 4, kAsks>(at, weights, v, next, words, stride);
        break;
      case 3:
        value_lanes<F, kQueries, 3, kAsks>(at, weights, v, next, words, stride);
        break;
      case 2:
        value_lanes<F, kQueries, 2, kAsks>(at, weights, v, next, words, stride);
        break;
      default:
        value_lanes<F, kQueries, 1, kAsks>(at, weights, v, next, words, stride);
    }
  }
}

inline float fold_sums(const Vf* sums) {
  float lanes[16];
  for (int part = 0; part < kPer16; ++part) store_vector(lanes + part * kWidth, sums[part]);
  fold_lanes(lanes);
  return lanes[0];
}

// A query's softmax so far.
struct RunningSoftmax {
  float maximum, l;
};

// Weights, as words, of a block's scores [count padded to 16], which are -infinity beyond its end.
// Returns what earlier sums are to be multiplied by.
template <typename F>
inline float weights_of(typename F::Word* weights, const float* scores, int64_t count, float scale,
                        RunningSoftmax& softmax) {
  constexpr bool kBFloat16 = F::kPerWord == 2 || F::kSwapped;
  Vf best = splat(minus_infinity());
  for (int64_t i = 0; i < count; i += kWidth) best = max(load_vector(scores + i), best);
  float m = best[0];
  for (int i = 1; i < kWidth; ++i) m = best[i] > m ? best[i] : m;
  m *= scale;
  const float before = softmax.maximum, now = m > before ? m : before;
  const float reference = now == minus_infinity() ? 0.0f : now;
  const float factor = before == now ? 1.0f : exp2_weight<6>(splat(before - reference))[0];
  Vf sums[kPer16] = {};
  for (int64_t i = 0; i < count; i += 16) {
#pragma GCC unroll 4
    for (int part = 0; part < kPer16; ++part) {
      const int64_t at = i + part * kWidth;
      const Vf e =
          softmax_weight<kBFloat16>(fma(load_vector(scores + at), splat(scale), splat(-reference)));
      sums[part] += e;
      F::put(weights, at, F::rounded(e));
    }
  }
  softmax = {now, __builtin_fmaf(softmax.l, factor, fold_sums(sums))};
  return factor;
}

inline void rescale(float* sums, float factor, int64_t padded) {
  if (factor == 1.0f) return;
  for (int64_t i = 0; i < padded; i += kWidth) {
    store_vector(sums + i, load_vector(sums + i) * splat(factor));
  }
}

}  // namespace
}  // namespace rlir::cpu
