// Attention of one row over the cache of cpu/decoder.h: shared positions, then its own, in one
// softmax. Scores, weights and values stay in the first caches; two queries of a key head go
// together, so that a vector of keys or values is loaded once for both.
//
// Here key slots are lanes, in cpu/attention.h queries are. Order and bits are the same
// (cpu/video_attention.h): blocks of 128 absolute slots, online softmax, one chain over d and one
// over the slots. So a rollout's bits are those of the training forward. By AMX: cpu/cache_tiles.h.
//
// Internal linkage: compiled once per instruction set.
#pragma once

#include "core/exp2.h"
#include "cpu/softmax.h"
#include "cpu/video_attention.h"
#include "cpu/words.h"

namespace rlir::cpu {
namespace {  // nothing here may be shared between instruction sets

#if defined(__AVX512F__)
constexpr int kScoreBlocks = 4;   // 16 positions each, at a time
constexpr int kValueVectors = 4;  // vectors of d at a time
#elif defined(__AVX2__) && defined(__FMA__)
constexpr int kScoreBlocks = 2;
constexpr int kValueVectors = 4;
#else
constexpr int kScoreBlocks = 1;
constexpr int kValueVectors = 4;
#endif
constexpr int64_t kKeyGroup = 64;  // positions whose keys lie together: [words of d][64]

// Positions 0 .. count - 1 of one head of one sequence. A cache is read once a step, faster than
// memory brings it by itself: while a segment is read, the same places of the next one are asked
// for (next_k, next_v; those of the segment itself where there is none).
template <typename F>
struct Segment {
  const typename F::Word *k, *v;
  int64_t count;
  const typename F::Word *next_k, *next_v;
};

template <int kVectors16>
inline void ask_for(const void* x) {  // whole lines of 64 bytes
#pragma GCC unroll 4
  for (int i = 0; i < kVectors16; ++i) {
    __builtin_prefetch(static_cast<const char*>(x) + 64 * i, 0, 2);
  }
}

// Not inlined: amid other code the compiler runs out of registers and spills in the loop.
template <typename F, int kQueries, int kBlocks>
__attribute__((noinline)) void score_blocks(float* const* scores, const typename F::Word* const* q,
                                            const typename F::Word* k, const typename F::Word* next,
                                            int64_t words) {
  constexpr int kParts = kBlocks * kPer16;
  Vf sums[kQueries][kParts] = {};
  for (int64_t w = 0; w < words; ++w) {
    typename F::Lanes lanes[kParts];
    ask_for<kBlocks>(next + w * kKeyGroup);
#pragma GCC unroll 8
    for (int i = 0; i < kParts; ++i) {
      lanes[i] = F::load_lanes(k + w * kKeyGroup + i * kWidth);
    }
#pragma GCC unroll 2
    for (int j = 0; j < kQueries; ++j) {
      const typename F::Lanes value = F::broadcast(q[j] + w);
#pragma GCC unroll 8
      for (int i = 0; i < kParts; ++i) sums[j][i] = F::multiply_add(lanes[i], value, sums[j][i]);
    }
  }
#pragma GCC unroll 2
  for (int j = 0; j < kQueries; ++j) {
#pragma GCC unroll 8
    for (int i = 0; i < kParts; ++i) store_vector(scores[j] + i * kWidth, sums[j][i]);
  }
}

// scores[j][0 .. count rounded up to 16): q_j k; what lies beyond count is anything.
template <typename F, int kQueries>
inline void scores_of(float* const* scores, const typename F::Word* const* q,
                      const Segment<F>& seen, int64_t words) {
  const int64_t end = round_up(seen.count, 16);
  float* at[kQueries];
  for (int64_t i = 0; i < end;) {
    const int64_t start = i / kKeyGroup * kKeyGroup * words + i % kKeyGroup;
    const auto *k = seen.k + start, *next = seen.next_k + start;
    for (int j = 0; j < kQueries; ++j) at[j] = scores[j] + i;
    if (i + kScoreBlocks * 16 <= end) {  // a divisor of the group: whole ones stay within
      score_blocks<F, kQueries, kScoreBlocks>(at, q, k, next, words);
      i += kScoreBlocks * 16;
    } else {
      score_blocks<F, kQueries, 1>(at, q, k, next, words);
      i += 16;
    }
  }
}

template <typename F, int kQueries, int kUsed>
__attribute__((noinline)) void value_lanes(float* const* out,
                                           const typename F::Word* const* weights,
                                           const typename F::Word* v, const typename F::Word* next,
                                           int64_t words, int64_t stride) {
  Vf sums[kQueries][kUsed];
#pragma GCC unroll 2
  for (int j = 0; j < kQueries; ++j) {
#pragma GCC unroll 4
    for (int i = 0; i < kUsed; ++i) sums[j][i] = load_vector(out[j] + i * kWidth);
  }
  for (int64_t w = 0; w < words; ++w) {
    typename F::Lanes lanes[kUsed];
    ask_for<(kUsed + kPer16 - 1) / kPer16>(next + w * stride);
#pragma GCC unroll 4
    for (int i = 0; i < kUsed; ++i) lanes[i] = F::load_lanes(v + w * stride + i * kWidth);
#pragma GCC unroll 2
    for (int j = 0; j < kQueries; ++j) {
      const typename F::Lanes value = F::broadcast(weights[j] + w);
#pragma GCC unroll 4
      for (int i = 0; i < kUsed; ++i) sums[j][i] = F::multiply_add(lanes[i], value, sums[j][i]);
    }
  }
#pragma GCC unroll 2
  for (int j = 0; j < kQueries; ++j) {
#pragma GCC unroll 4
    for (int i = 0; i < kUsed; ++i) store_vector(out[j] + i * kWidth, sums[j][i]);
  }
}

// out[j][0 .. stride) += weights[j] v, a chain over `words` words of positions.
template <typename F, int kQueries>
inline void add_values(float* const* out, const typename F::Word* const* weights,
                       const typename F::Word* values, const typename F::Word* next_values,
                       int64_t words, int64_t stride) {
  for (int64_t lane = 0; lane < stride; lane += kValueVectors * kWidth) {
    float* at[kQueries];
    for (int j = 0; j < kQueries; ++j) at[j] = out[j] + lane;
    const auto *v = values + lane, *next = next_values + lane;
    switch (at_most((stride - lane) / kWidth, kValueVectors)) {
      case 4:
        value_lanes<F, kQueries, 4>(at, weights, v, next, words, stride);
        break;
      case 3:
        value_lanes<F, kQueries, 3>(at, weights, v, next, words, stride);
        break;
      case 2:
        value_lanes<F, kQueries, 2>(at, weights, v, next, words, stride);
        break;
      default:
        value_lanes<F, kQueries, 1>(at, weights, v, next, words, stride);
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
  constexpr int kDegree = F::kPerWord == 2 || F::kSwapped ? 4 : 6;
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
          exp2_weight<kDegree>(fma(load_vector(scores + at), splat(scale), splat(-reference)));
      sums[part] += e;
      F::put(weights, at, F::rounded(e));
    }
  }
  softmax = {now, __builtin_fmaf(softmax.l, factor, fold_sums(sums))};
  return factor;
}

// Work space of a query.
inline int64_t query_scratch(int64_t seen) { return 2 * (round_up(seen, 16) + 32); }

// out[j] [d padded to 16] of kQueries queries q[j] of one key head. The shared positions are an
// even number, so that pairs of positions lie in one segment. `scale` includes log2(e).
template <typename F, int kQueries>
inline void attend(float* const* out, const typename F::Word* const* q, const Segment<F>& shared,
                   const Segment<F>& own, int64_t dim, float scale, float* scratch) {
  using Word = typename F::Word;
  const int64_t padded = round_up(dim, 16), words = words_for<F>(dim);
  const int64_t total = shared.count + own.count, size = round_up(total, 16) + 32;
  float *scores[kQueries], *own_scores[kQueries];
  RunningSoftmax softmax[kQueries];
  for (int j = 0; j < kQueries; ++j) {
    scores[j] = scratch + j * 2 * size;
    own_scores[j] = scores[j] + shared.count;
    softmax[j] = {minus_infinity(), 0.0f};
    for (int64_t i = 0; i < padded; i += kWidth) store_vector(out[j] + i, Vf{});
  }
  scores_of<F, kQueries>(scores, q, shared, words);
  scores_of<F, kQueries>(own_scores, q, own, words);  // over what lies beyond the shared ones
  for (int j = 0; j < kQueries; ++j) {
    for (int64_t i = total; i < round_up(total, 16); ++i) scores[j][i] = minus_infinity();
  }
  for (int64_t start = 0; start < total; start += kKeyBlock) {
    const int64_t end = at_most(start + kKeyBlock, total);
    const Word* weights[kQueries];
    for (int j = 0; j < kQueries; ++j) {
      Word* to = reinterpret_cast<Word*>(scores[j] + size);
      const float factor =
          weights_of<F>(to, scores[j] + start, round_up(end - start, 16), scale, softmax[j]);
      weights[j] = to;
      if (factor == 1.0f || start == 0) continue;
      for (int64_t i = 0; i < padded; i += kWidth) {
        store_vector(out[j] + i, load_vector(out[j] + i) * splat(factor));
      }
    }
    const auto add = [&](const Segment<F>& part, int64_t from, int64_t to) {
      if (from >= to) return;
      const int64_t at = words_of<F>(from, F::kSwapped) * padded;
      add_values<F, kQueries>(out, weights, part.v + at, part.next_v + at, words_for<F>(to - from),
                              padded);
      for (int j = 0; j < kQueries; ++j) weights[j] += words_for<F>(to - from);
    };
    add(shared, start, at_most(end, shared.count));
    add(own, start > shared.count ? start - shared.count : 0, end - shared.count);
  }
  for (int j = 0; j < kQueries; ++j) {
    const float inverse = 1.0f / softmax[j].l;
    for (int64_t i = 0; i < padded; i += kWidth) {
      store_vector(out[j] + i, load_vector(out[j] + i) * splat(inverse));
    }
  }
}

}  // namespace
}  // namespace rlir::cpu

#if defined(__AMX_BF16__)
#include "cpu/cache_tiles.h"
#endif

namespace rlir::cpu {
namespace {

// Work space of attend_some, whose rows see at most `seen` positions.
inline int64_t attention_scratch(int64_t seen, [[maybe_unused]] int64_t dim) {
  const int64_t vectors = 2 * query_scratch(seen);
#if defined(__AMX_BF16__)
  const int64_t tiles = TileSpace(dim).total;
  return vectors > tiles ? vectors : tiles;
#else
  return vectors;
#endif
}

// attend for as many of `queries` queries of one key head as go together; returns how many. q and
// out [queries][d padded].
template <typename F>
inline int64_t attend_some(float* out, const typename F::Word* q, int64_t queries,
                           const Segment<F>& shared, const Segment<F>& own, int64_t dim,
                           float scale, float* scratch) {
#if defined(__AMX_BF16__)
  if constexpr (kTiled<F>) {
    const int64_t n = at_most(queries, kTile);
    attend_tiles(out, q, n, shared, own, dim, scale, scratch);
    return n;
  }
#endif
  const int64_t padded = round_up(dim, 16);
  float* const to[2] = {out, out + padded};
  const typename F::Word* const from[2] = {q, q + padded};
  if (queries > 1) {
    attend<F, 2>(to, from, shared, own, dim, scale, scratch);
    return 2;
  }
  attend<F, 1>(to, from, shared, own, dim, scale, scratch);
  return 1;
}

}  // namespace
}  // namespace rlir::cpu
