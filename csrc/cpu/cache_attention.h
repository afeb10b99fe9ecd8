// Attention of a rollout's rows over the part of the cache of cpu/decoder.h in which key slots are
// lanes: the prompt's tail, then the rollout's own slots. Queries of a key head go over a block of
// 128 slots one after the other, two at a time, so that a block comes from memory once and a vector
// of keys or values is loaded once for both.
//
// In cpu/attention.h queries are lanes. Order and bits are the same (cpu/video_attention.h): blocks
// of 128 absolute slots, online softmax, one chain over d and one over the slots. So a rollout's
// bits are those of the training forward, and it goes on from where the panels of whole blocks
// ended (cpu/group_decode_attention.h). By AMX: cpu/cache_tiles.h.
//
// Internal linkage: compiled once per instruction set.
#pragma once

#include "core/reach.h"
#include "cpu/decoder.h"
#include "cpu/slot_lanes.h"
#include "cpu/video_attention.h"

namespace rlir::cpu {
namespace {  // nothing here may be shared between instruction sets

// Groups of 16 slots at a time.
#if defined(__AVX512F__)
constexpr int kScoreBlocks = 4;
#elif defined(__AVX2__) && defined(__FMA__)
constexpr int kScoreBlocks = 2;
#else
constexpr int kScoreBlocks = 1;
#endif
constexpr int64_t kKeyGroup = 64;  // slots whose keys lie together: [words of d][64]

// A block's slots of one head of one sequence, `k` and `v` at its first one, and what is asked of
// memory meanwhile: the same places of what is read next (of the block itself where nothing is).
template <typename F>
struct KeyBlock {
  const typename F::Word *k, *v, *next_k, *next_v;
};

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

// scores[j][from .. to rounded up to 16) of a block's slots; `from` is a multiple of 16.
template <typename F, int kQueries>
inline void scores_of(float* const* scores, const typename F::Word* const* q,
                      const KeyBlock<F>& block, int64_t from, int64_t to, int64_t words) {
  const int64_t end = round_up(to, 16);
  float* at[kQueries];
  for (int64_t i = from; i < end;) {
    const int64_t start = i / kKeyGroup * kKeyGroup * words + i % kKeyGroup;
    const auto *k = block.k + start, *next = block.next_k + start;
    for (int j = 0; j < kQueries; ++j) at[j] = scores[j] + i;
    const bool whole = i % (kScoreBlocks * 16) == 0 && i + kScoreBlocks * 16 <= end;
    if (whole) {  // a divisor of the group: stays within
      score_blocks<F, kQueries, kScoreBlocks>(at, q, k, next, words);
      i += kScoreBlocks * 16;
    } else {
      score_blocks<F, kQueries, 1>(at, q, k, next, words);
      i += 16;
    }
  }
}

// A query on its way: q [d padded to 16], sums [d padded to 16], which are out times l.
template <typename F>
struct CacheQuery {
  const typename F::Word* q;
  const Reach* reach;
  const uint64_t* seen;  // bits of slots from the head's base on
  float* sums;
  RunningSoftmax softmax;
};

// Whether a query sees any of a block's slots.
inline bool sees_block(const Reach& r, int64_t start, int64_t count) {
  return r.low < r.high && r.low < start + count && r.high > start;
}

// Where a query's state begins, or what it goes on from (cpu/group_decode_attention.h).
template <typename F>
inline void begin_query(CacheQuery<F>& query, const float* state, int64_t dim) {
  const int64_t padded = round_up(dim, 16);
  for (int64_t i = 0; i < padded; i += kWidth) store_vector(query.sums + i, Vf{});
  query.softmax = {minus_infinity(), 0.0f};
  if (state == nullptr) return;
  query.softmax = {state[0], state[1]};
  __builtin_memcpy(query.sums, state + 2, sizeof(float) * static_cast<uint64_t>(dim));
}

// What a block consists of: the first `tail` slots are the prompt's, those up to `count` own.
template <typename F>
struct CacheBlock {
  KeyBlock<F> tail_keys, own_keys;
  int64_t base, start, tail, count;  // base: of the head
};

// The slots of a block that a query does not see get -infinity, and those up to a multiple of 16.
template <typename F>
inline void mask_row(const uint64_t* seen, const CacheBlock<F>& block, float* scores) {
  const uint64_t* words = seen + (block.start - block.base) / 64;
  for (int64_t i = 0; i < block.count; i += 64) {
    const uint64_t word = words[i / 64];
    if (word == ~uint64_t{0}) continue;
    for (int64_t j = 0; j < at_most(round_up(block.count - i, 16), 64); j += kWidth) {
      const Vi bits = (Vi{} + static_cast<int32_t>(word >> j)) & ((Vi{} + 1) << kLaneNumbers);
      store_vector(scores + i + j,
                   select(bits != 0, load_vector(scores + i + j), splat(minus_infinity())));
    }
  }
}

// Slots that share a vector with the prompt's last ones were computed from the wrong keys: what
// `write` does to scores, but for the first `keep` of the vector.
template <typename Write>
inline void keep_first(float* const* scores, int queries, int64_t at, int64_t keep,
                       const Write& write) {
  float kept[16][16];
  for (int j = 0; j < queries; ++j) {
    for (int64_t i = 0; i < keep; ++i) kept[j][i] = scores[j][at + i];
  }
  write();
  for (int j = 0; j < queries; ++j) {
    for (int64_t i = 0; i < keep; ++i) scores[j][at + i] = kept[j][i];
  }
}

// A block for kQueries queries of one key head. `scale` includes log2(e).
template <typename F, int kQueries>
inline void attend_block(CacheQuery<F>* const* queries, const CacheBlock<F>& block, int64_t dim,
                         float scale, float* scratch) {
  using Word = typename F::Word;
  const int64_t padded = round_up(dim, 16), words = words_for<F>(dim);
  float *scores[kQueries], *sums[kQueries];
  const Word *q[kQueries], *weights[kQueries];
  for (int j = 0; j < kQueries; ++j) {
    scores[j] = scratch + j * 2 * kScoreRow;
    q[j] = queries[j]->q;
    sums[j] = queries[j]->sums;
  }
  const int64_t border = block.tail / 16 * 16;
  if (block.tail > 0) scores_of<F, kQueries>(scores, q, block.tail_keys, 0, block.tail, words);
  keep_first(scores, kQueries, border, block.tail - border, [&] {
    scores_of<F, kQueries>(scores, q, block.own_keys, border, block.count, words);
  });
  for (int j = 0; j < kQueries; ++j) {
    mask_row(queries[j]->seen, block, scores[j]);
    Word* to = reinterpret_cast<Word*>(scores[j] + kScoreRow);
    const float factor =
        weights_of<F>(to, scores[j], round_up(block.count, 16), scale, queries[j]->softmax);
    rescale(sums[j], factor, padded);
    weights[j] = to;
  }
  const auto add = [&](const KeyBlock<F>& keys, int64_t from, int64_t to) {
    if (from >= to) return;
    const int64_t first = words_of<F>(from, F::kSwapped), last = words_for<F>(to);
    add_values<F, kQueries>(sums, weights, keys.v + first * padded, keys.next_v + first * padded,
                            last - first, padded);
    for (int j = 0; j < kQueries; ++j) weights[j] += last - first;
  };
  add(block.tail_keys, 0, block.tail);
  add(block.own_keys, block.tail, block.count);
}

}  // namespace
}  // namespace rlir::cpu

#if defined(__AMX_BF16__)
#include "cpu/cache_tiles.h"
#endif

namespace rlir::cpu {
namespace {

// Queries that go over a block together.
template <typename F>
constexpr int kTogether = kTiled<F> ? 16 : 2;

// Floats that attend_queries wants.
inline int64_t attention_scratch([[maybe_unused]] int64_t dim) {
  constexpr int64_t kVectors = 4 * kScoreRow;
#if defined(__AMX_BF16__)
  const int64_t tiles = TileSpace(dim).total;
  return kVectors > tiles ? kVectors : tiles;
#else
  return kVectors;
#endif
}

template <typename F>
inline void attend_together(CacheQuery<F>* const* queries, int64_t count,
                            const CacheBlock<F>& block, int64_t dim, float scale, float* scratch) {
#if defined(__AMX_BF16__)
  if constexpr (kTiled<F>) {
    return attend_tiles(queries, count, block, dim, scale, scratch);
  }
#endif
  (count > 1 ? attend_block<F, 2> : attend_block<F, 1>)(queries, block, dim, scale, scratch);
}

// Blocks of one sequence and key head: tails [128 slots], and the ring of own slots.
template <typename F>
struct CacheHead {
  const typename F::Word *tail_k, *tail_v, *own_k, *own_v;
  const typename F::Word *after_k, *after_v;  // what is read when this is done
  int64_t base, tail, capacity;

  CacheBlock<F> block(int64_t start, int64_t end, int64_t words, int64_t padded) const {
    const int64_t index = (start - base) % capacity, next = (index + kKeyBlock) % capacity;
    const bool last = start + kKeyBlock >= end, first = start == base;
    CacheBlock<F> b;
    b.base = base;
    b.start = start;
    b.count = at_most(kKeyBlock, end - start);
    b.tail = first ? at_most(tail, b.count) : 0;
    const auto values = [&](int64_t i) { return words_of<F>(i, F::kSwapped) * padded; };
    b.own_keys = {own_k + index * words, own_v + values(index),
                  last ? after_k : own_k + next * words, last ? after_v : own_v + values(next)};
    b.tail_keys = {tail_k, tail_v, tail_k, tail_v};
    return b;
  }
};

// All blocks from `base` on, for queries of one key head.
template <typename F>
inline void attend_queries(CacheQuery<F>* queries, int64_t count, const CacheHead<F>& head,
                           int64_t dim, float scale, float* scratch) {
  int64_t low = INT64_MAX, high = 0;
  for (int64_t i = 0; i < count; ++i) {
    const Reach& r = *queries[i].reach;
    low = r.low < low ? r.low : low;
    high = r.high > high ? r.high : high;
  }
  const int64_t words = words_for<F>(dim), padded = round_up(dim, 16);
  const int64_t first = low > head.base ? low / kKeyBlock * kKeyBlock : head.base;
  for (int64_t start = first; start < high; start += kKeyBlock) {
    CacheBlock<F> block = head.block(start, high, words, padded);
    CacheQuery<F>* some[kTogether<F>];
    int n = 0;
    const auto flush = [&] {
      if (n == 0) return;
      attend_together<F>(some, n, block, dim, scale, scratch);
      n = 0;
      block.own_keys.next_k = block.own_keys.k;  // asked for once
      block.own_keys.next_v = block.own_keys.v;
    };
    for (int64_t i = 0; i < count; ++i) {
      if (!sees_block(*queries[i].reach, start, block.count)) continue;
      some[n++] = queries + i;
      if (n == kTogether<F>) flush();
    }
    flush();
  }
}

}  // namespace
}  // namespace rlir::cpu
