// Panels of few queries, as in decoding, where a vector of queries would be mostly empty: here key
// slots are lanes (cpu/slot_lanes.h), and a query's scores, weights and sums are rows. Keys are
// turned in registers as they come; by AMX it is their scores that are turned, since a tile of
// queries costs the same full or empty. Order and bits are a panel's (cpu/video_attention.h).
//
// Internal linkage: compiled once per instruction set.
#pragma once

#include "cpu/attention_ahead.h"
#include "cpu/attention_panel.h"
#include "cpu/slot_lanes.h"

namespace rlir::cpu {
namespace {  // nothing here may be shared between instruction sets

// Queries of such a panel at most: with more of them a panel's way is the shorter one.
template <typename F>
constexpr int kFew = kTiled<F> ? 16 : kWidth / 2;
// Queries whose sums of values fit into the registers.
constexpr int kFewTogether = kWidth == 16 ? 4 : 2;

template <typename F>
inline bool are_few(const Panel<F>& p, int64_t dim) {
  return p.lanes <= kFew<F> && dim <= (kTiled<F> ? 256 : kChain);
}

// A square of kWidth rows to another matrix, turned; `rows` rows of the result are written.
inline void turn(const float* from, int64_t from_stride, float* to, int64_t to_stride, int rows) {
  Vf square[kWidth];
#pragma GCC unroll 16
  for (int i = 0; i < kWidth; ++i) square[i] = load_vector(from + i * from_stride);
  transpose(square);
#pragma GCC unroll 16
  for (int i = 0; i < kWidth; ++i) {
    if (i < rows) store_vector(to + i * to_stride, square[i]);
  }
}

#if defined(__AVX512F__)
// Four columns of a square to rows: a line of memory brings four slots of four queries each.
inline void turn_four(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
  typedef int32_t Order __attribute__((vector_size(64)));
  constexpr Order kLow = {0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29};
  constexpr Order kHigh = {2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31};
  constexpr Order kFirst = {0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29};
  constexpr Order kSecond = {2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31};
  Vf part[4];  // slots j, 4 + j, 8 + j, 12 + j
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const auto row = [&](int i) { return _mm_loadu_ps(from + (4 * i + j) * from_stride); };
    const auto low = _mm512_castps128_ps512(row(0));
    part[j] = (Vf)_mm512_mask_broadcast_f32x4(
        _mm512_mask_broadcast_f32x4(_mm512_mask_broadcast_f32x4(low, 0x00f0, row(1)), 0x0f00,
                                    row(2)),
        0xf000, row(3));
  }
  const Vf low[2] = {__builtin_shuffle(part[0], part[1], kLow),
                     __builtin_shuffle(part[2], part[3], kLow)};
  const Vf high[2] = {__builtin_shuffle(part[0], part[1], kHigh),
                      __builtin_shuffle(part[2], part[3], kHigh)};
  store_vector(to, __builtin_shuffle(low[0], low[1], kFirst));
  store_vector(to + to_stride, __builtin_shuffle(low[0], low[1], kSecond));
  store_vector(to + 2 * to_stride, __builtin_shuffle(high[0], high[1], kFirst));
  store_vector(to + 3 * to_stride, __builtin_shuffle(high[0], high[1], kSecond));
}
#endif

// Scores and weights of a block, of one key head after the other.
template <typename F>
struct FewSpace {
  static constexpr int kMost = kFew<F>, kRoom = kMost > kWidth ? kMost : kWidth;
  alignas(64) float scores[kRoom][kScoreRow];
  alignas(64) typename F::Word weights[kRoom][kKeyBlock / F::kPerWord];

  FewSpace() {
    if constexpr (kTiled<F>) __builtin_memset(weights, 0, sizeof weights);
  }
};

// The queries of a key head.
template <typename F>
struct FewQueries {
  using Word = typename F::Word;
  static constexpr int kMost = FewSpace<F>::kMost, kRoom = FewSpace<F>::kRoom;
  static constexpr int64_t kMostDim = kTiled<F> ? 256 : kChain;

  int count;
  int64_t dim, padded;
  float (*scores)[kScoreRow];
  Word (*weights)[kKeyBlock / F::kPerWord];
  alignas(64) Word q[kMost][kMostDim / F::kPerWord];
  alignas(64) float sums[kRoom][kMostDim];
  RunningSoftmax softmax[kMost];

  FewQueries() {}  // what `begin` does not write reaches no result
  void begin(const Panel<F>& p, int64_t d, FewSpace<F>& space) {
    count = p.lanes;
    dim = d;
    padded = round_up(d, 16);
    scores = space.scores;
    weights = space.weights;
    for (int j = 0; j < count; ++j) {
      for (int64_t w = 0; w < words_for<F>(dim); ++w) q[j][w] = p.q[w * kPanel + j];
      softmax[j] = {p.maximum[j], p.l[j]};
    }
    take_sums(p);
  }

  void take_sums(const Panel<F>& p) {
    for (int64_t d = 0; d < padded; d += kWidth) {
      turn(p.sums + d * kPanel, kPanel, sums[0] + d, kMostDim, count);
    }
  }

  void give_sums(Panel<F>& p) const {
    for (int64_t d = 0; d < padded; d += kWidth) {
      turn(sums[0] + d, kMostDim, p.sums + d * kPanel, kPanel, kWidth);
    }
    for (int j = 0; j < count; ++j) {
      p.maximum[j] = softmax[j].maximum;
      p.l[j] = softmax[j].l;
    }
  }

  // Scores from a panel's [slots][kPanel], -infinity behind the last one; and to it.
  void take_scores(const Panel<F>& p, int64_t slots) {
    for (int64_t k = 0; k < slots; k += kWidth) {
#if defined(__AVX512F__)
      if (count <= 4) {
        turn_four(p.scores + k * kPanel, kPanel, scores[0] + k, kScoreRow);
        continue;
      }
#endif
      turn(p.scores + k * kPanel, kPanel, scores[0] + k, kScoreRow, count);
    }
    end_scores(slots);
  }

  void give_scores(Panel<F>& p, int64_t slots) const {
    for (int64_t k = 0; k < slots; k += kWidth) {
      turn(scores[0] + k, kScoreRow, p.scores + k * kPanel, kPanel, kWidth);
    }
  }

  void end_scores(int64_t slots) {
    for (int j = 0; j < count; ++j) {
      for (int64_t k = slots; k < round_up(slots, 16); ++k) scores[j][k] = minus_infinity();
    }
  }

  // As add_values_apart wants them.
  void give_weights(Panel<F>& p, int64_t steps) const {
    Word* to = reinterpret_cast<Word*>(p.scores);
    for (int64_t w = 0; w < steps; ++w) {
      for (int j = 0; j < count; ++j) to[w * kPanel + j] = weights[j][w];
    }
  }
};

// Where the rows of a block are: one after the other, or wherever their slots are.
struct SlotRows {
  const KeySource& keys;
  bool bfloat16, values;
  int64_t start, stride;  // bytes
  const char* first;      // null where the block lies in both segments

  SlotRows(const KeySource& s, bool b, bool v, int64_t slot, int64_t count)
      : keys(s), bfloat16(b), values(v), start(slot), stride(0), first(nullptr) {
    const int part = segment_of(s, slot, count);
    if (part < 0) return;
    stride = (v ? s.v_stride[part] : s.k_stride[part]) * (b ? 2 : 4);
    first = static_cast<const char*>(slot_row(b, s, v, slot));
  }
  const void* operator[](int64_t k) const {
    return first != nullptr ? first + k * stride : slot_row(bfloat16, keys, values, start + k);
  }
};

// kWidth words of a row as they are: the call's dtype is that of its words.
template <typename F>
inline Vf row_words_at(const void* x) {
  if constexpr (F::kSwapped) {
    return __builtin_shuffle(load_values(x, Dtype::kBFloat16, 0), kLaneNumbers ^ 1);
  } else {
    Vf words;
    __builtin_memcpy(&words, x, sizeof words);
    return words;
  }
}

// scores[j][0 .. kWidth) of the slots of kWidth rows.
template <typename F, int kQueries>
__attribute__((noinline)) void score_square(float* const* scores, const typename F::Word* const* q,
                                            const void* const* rows, int64_t dim) {
  using Lanes = typename F::Lanes;
  constexpr bool kBFloat16 = Panel<F>::kBFloat16;
  constexpr Dtype kDtype = kBFloat16 ? Dtype::kBFloat16 : Dtype::kFloat32;
  constexpr int64_t kStep = kWidth * F::kPerWord;  // elements
  Vf sums[kQueries] = {}, square[kWidth];
  const auto add = [&](int64_t w, int n) {
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) {
#pragma GCC unroll 8
      for (int j = 0; j < kQueries; ++j) {
        sums[j] = F::multiply_add((Lanes)square[i], F::broadcast(q[j] + w + i), sums[j]);
      }
    }
  };
  int64_t d = 0;
  for (; d + kStep <= dim; d += kStep) {
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i) {
      square[i] = row_words_at<F>(element(kBFloat16, rows[i], d));
    }
    transpose(square);
    add(d / F::kPerWord, kWidth);
  }
  if (d < dim) {
    for (int i = 0; i < kWidth; ++i) {
      const Part<F::kPerWord> part(element(kBFloat16, rows[i], d), kDtype, dim - d);
      square[i] = row_words_at<F>(part.data);
    }
    transpose(square);
    const int64_t w = d / F::kPerWord;
    add(w, static_cast<int>(words_for<F>(dim) - w));
  }
#pragma GCC unroll 8
  for (int j = 0; j < kQueries; ++j) store_vector(scores[j], sums[j]);
}

// Scores of a block's slots, -infinity behind the last one.
template <typename F, int kQueries>
inline void score_few(FewQueries<F>& few, const SlotRows& keys, int64_t count) {
  const typename F::Word* q[kQueries];
  float* scores[kQueries];
  const void* rows[kWidth];
  for (int j = 0; j < kQueries; ++j) q[j] = few.q[at_most(j, few.count - 1)];
  for (int64_t k = 0; k < count; k += kWidth) {
    // Behind the last slot it is the last one again.
    for (int i = 0; i < kWidth; ++i) rows[i] = keys[at_most(k + i, count - 1)];
    for (int j = 0; j < kQueries; ++j) scores[j] = few.scores[j] + k;
    score_square<F, kQueries>(scores, q, rows, few.dim);
  }
  few.end_scores(count);
}

template <typename F>
inline void score_few(FewQueries<F>& few, Panel<F>& p, const VideoAttention& a, int64_t start,
                      int64_t count) {
  const SlotRows keys(a.keys, Panel<F>::kBFloat16, false, start, count);
  if constexpr (kTiled<F>) {
    const Rows<F> rows = block_rows<F>(a.keys, false, start, count, a.dim, false, p.copy);
    panel_product<F>(p.scores, rows.first, rows.stride, count, p.q, words_for<F>(a.dim), p.lanes,
                     false);
  } else if (kFew<F> > 4 && few.count > 4) {
    score_few<F, kFew<F>>(few, keys, count);
  } else if (kFew<F> > 2 && few.count > 2) {
    score_few<F, (kFew<F> > 2 ? 4 : 2)>(few, keys, count);
  } else if (few.count > 1) {
    score_few<F, 2>(few, keys, count);
  } else {
    score_few<F, 1>(few, keys, count);
  }
}

template <typename F, int kQueries>
inline void add_few(FewQueries<F>& few, int first, const typename F::Word* values, int64_t steps) {
  const typename F::Word* weights[kQueries];
  float* sums[kQueries];
  for (int j = 0; j < kQueries; ++j) {
    weights[j] = few.weights[first + j];
    sums[j] = few.sums[first + j];
  }
  add_values<F, kQueries, false>(sums, weights, values, values, steps, few.padded);
}

template <typename F>
inline void add_few(FewQueries<F>& few, const typename F::Word* values, int64_t steps) {
#if defined(__AMX_BF16__)
  if constexpr (kTiled<F>) {
    memory_is_written();
    for (int64_t d = 0; d < few.padded; d += 3 * kTile) {
      tile_product(few.sums[0] + d, {FewQueries<F>::kMostDim, few.padded}, few.weights[0],
                   kKeyBlock / 2, kTile, values + d, steps,
                   static_cast<int>(at_most(3 * kTile, few.padded - d)), true, {});
    }
    return;
  }
#endif
  int j = 0;
  for (; j + kFewTogether <= few.count; j += kFewTogether) {
    add_few<F, kFewTogether>(few, j, values, steps);
  }
  for (; j + 2 <= few.count; j += 2) add_few<F, 2>(few, j, values, steps);
  if (j < few.count) add_few<F, 1>(few, j, values, steps);
}

// A block; `ahead` is asked for as it goes.
template <typename F>
inline void attend_few(FewQueries<F>& few, Panel<F>& p, const VideoAttention& a, int64_t block,
                       RowsAhead ahead) {
  constexpr bool kBFloat16 = Panel<F>::kBFloat16;
  const int64_t start = block * kKeyBlock;
  const int64_t count = at_most(p.reach.most_high - start, kKeyBlock);
  score_few(few, p, a, start, count);
  const bool all = seen_by_all(a.mask, p.reach, start, count);
  bool seen[kKeyBlock];
  if (!all) {
    if constexpr (!kTiled<F>) few.give_scores(p, count);
    mask_scores(a.mask, p.reach, start, count, p.used, p.scores, seen);
  }
  if (kTiled<F> || !all) few.take_scores(p, count);
  for (int j = 0; j < few.count; ++j) {
    rescale(
        few.sums[j],
        weights_of<F>(few.weights[j], few.scores[j], round_up(count, 16), a.scale, few.softmax[j]),
        few.padded);
  }
  const SlotRows values(a.keys, kBFloat16, true, start, count);
  const int64_t pace = ahead.pace((count + 1) / 2);
  const auto row_of = [&](int64_t k) -> const void* {
    if (k % 2 == 0) ahead.ask(pace);
    return k < count && (all || seen[k]) ? values[k] : nullptr;
  };
  const int64_t steps = words_of<F>(count, true);
  if (!pack_pairs<F>(row_of, count, a.dim, !all, p.values)) {
    few.give_weights(p, steps);
    few.give_sums(p);
    add_values_apart<F>(p, a, start, count);
    few.take_sums(p);
    return;
  }
  add_few(few, p.values, steps);
}

}  // namespace
}  // namespace rlir::cpu
