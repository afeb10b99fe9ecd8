// A panel of queries: its state, and what it does with the scores of a block of keys. Formulas,
// order and bits: cpu/video_attention.h. Beside it: cpu/attention_seen.h (masks), attention_lanes.h
// (rows to lanes and back), attention_words.h (keys and values), attention_tiles.h (AMX).
//
// Internal linkage: compiled once per instruction set.
#pragma once

#include "core/exp2.h"
#include "cpu/attention_seen.h"
#include "cpu/attention_words.h"
#include "cpu/softmax.h"

namespace rlir::cpu {
namespace {  // nothing here may be shared between instruction sets

constexpr int64_t kBlockRows = kKeyBlock + kRowPad;  // of a panel's scores, as a product writes
constexpr float kLn2 = 0x1.62e430p-1f;

inline int64_t padded_dim(int64_t dim) { return round_up(dim, 16) + kRowPad; }

template <typename F>
struct Panel {
  using Word = typename F::Word;
  static constexpr bool kBFloat16 = F::kPerWord == 2 || F::kSwapped;

  int lanes, used;  // of kPanel; vectors
  PanelReach reach;
  Word* q;             // [words][kPanel]
  float* scores;       // [kBlockRows][kPanel], then weights in their place
  float* sums;         // [padded_dim][kPanel]: out times l
  float *maximum, *l;  // [kPanel]
  Word *values, *copy;
};

// Of a panel by itself, and of what panels that go over the same keys one after the other share.
template <typename F>
inline int64_t own_floats(int64_t dim) {
  return (round_up(words_for<F>(dim), 16) + padded_dim(dim) + 2) * kPanel;
}
template <typename F>
inline int64_t shared_floats(int64_t dim) {
  return kBlockRows * kPanel + 2 * kKeyBlock * round_up(dim, 16);
}
template <typename F>
inline int64_t panel_floats(int64_t dim) {
  return own_floats<F>(dim) + shared_floats<F>(dim);
}

// `count` panels in shared_floats and count times own_floats.
template <typename F>
inline void panels_at(Panel<F>* panels, int count, float* space, int64_t dim) {
  const int64_t words = round_up(words_for<F>(dim), 16), block = kKeyBlock * round_up(dim, 16);
  const auto take = [&space](int64_t n) {
    float* at = space;
    space += n;
    return at;
  };
  float* scores = take(kBlockRows * kPanel);
  auto* values = reinterpret_cast<typename F::Word*>(take(block));
  auto* copy = reinterpret_cast<typename F::Word*>(take(block));
  for (int i = 0; i < count; ++i) {
    Panel<F>& p = panels[i];
    p.q = reinterpret_cast<typename F::Word*>(take(words * kPanel));
    p.scores = scores;
    p.sums = take(padded_dim(dim) * kPanel);
    p.maximum = take(kPanel);
    p.l = take(kPanel);
    p.values = values;
    p.copy = copy;
  }
}

template <typename F>
inline Panel<F> panel_at(float* space, int64_t dim) {
  Panel<F> p;
  panels_at(&p, 1, space, dim);
  return p;
}

// Where lane number `lane` of all queries stands.
struct LanePlace {
  int64_t member, token, head;
  int64_t at(const LaneStrides& s) const {
    return member * s.member + token * s.token + head * s.head;
  }
};
inline LanePlace lane_place(const Queries& a, int64_t lane) {
  const int64_t row = lane / a.heads;
  return {row / a.tokens, row % a.tokens, lane % a.heads};
}

template <typename F>
inline void load_queries(Panel<F>& p, const VideoAttention& a, int64_t first) {
  p.lanes = static_cast<int>(at_most(a.queries.lanes() - first, kPanel));
  p.used = (p.lanes + kWidth - 1) / kWidth;
  for (int lane = 0; lane < p.lanes; lane += kWidth) {
    const void* rows[kWidth] = {};
    for (int i = lane; i < at_most(lane + kWidth, p.lanes); ++i) {
      const LanePlace place = lane_place(a.queries, first + i);
      const Reach& reach = a.queries.reach[place.member * a.queries.tokens + place.token];
      p.reach.set(i, reach);
      if (reach.low >= reach.high) continue;
      rows[i - lane] = element(Panel<F>::kBFloat16, a.queries.q, place.at(a.queries.stride));
    }
    put_lanes<F>(p.q, lane, rows, a.dim);
  }
  p.reach.finish(p.lanes);
}

template <typename F>
inline void clear_state(Panel<F>& p, int64_t dim) {
  for (int64_t d = 0; d < padded_dim(dim); ++d) {
    for (int i = 0; i < p.used * kWidth; i += kWidth) store_vector(p.sums + d * kPanel + i, Vf{});
  }
  for (int i = 0; i < kPanel; i += kWidth) {
    store_vector(p.maximum + i, splat(minus_infinity()));
    store_vector(p.l + i, Vf{});
  }
}

// Values (or keys) of a block as words along the slots: [pairs][dim padded]. Rows that are null are
// zeros. Returns whether all is finite, if it `checks`.
template <typename F, typename RowOf>
inline bool pack_pairs(const RowOf& row_of, int64_t count, int64_t dim, bool checks,
                       typename F::Word* out) {
  constexpr int64_t kPer = F::kPerWord;
  const int64_t stride = round_up(dim, 16);
  Vi special = {};
  for (int64_t k = 0; k < count; k += 2) {
    typename F::Word* to = out + k / kPer * stride;
    pair_rows<F>(to, stride, row_of(k), row_of(k + 1), dim);
    if (!checks) continue;
    for (int64_t i = 0; i < 2 / kPer * stride; i += kWidth) {
      const Vu bits = (Vu)load_vector(reinterpret_cast<const float*>(to + i));
      special |= (Vi)((bits & 0x7f800000u) == 0x7f800000u);
      if (kPer == 2) special |= (Vi)((bits & 0x7f80u) == 0x7f80u);
    }
  }
  return !any_lane(special);
}

// The same, or what pair_columns makes of it; rows that are not `seen` are left out. Returns
// whether what is left is finite, if `seen` says that some are not.
template <typename F>
inline bool pack_rows_of(const VideoAttention& a, bool values, int64_t start, int64_t count,
                         const bool* seen, typename F::Word* out) {
  const auto row_of = [&](int64_t k) -> const void* {
    const bool there = k < count && (seen == nullptr || seen[k]);
    return there ? slot_row(Panel<F>::kBFloat16, a.keys, values, start + k) : nullptr;
  };
#if defined(__AMX_BF16__)
  if constexpr (kTiled<F>) {
    const void* rows[kKeyBlock];
    for (int64_t k = 0; k < count; ++k) rows[k] = row_of(k);
    return pair_columns(rows, count, a.dim, seen != nullptr, out);
  }
#endif
  return pack_pairs<F>(row_of, count, a.dim, seen != nullptr, out);
}

// Weights of a block in place of the scores. Returns whether a maximum has grown: then sums must be
// multiplied by `factors`, one a lane.
template <typename F>
__attribute__((noinline)) bool weigh_block(Panel<F>& p, int64_t count, float scale,
                                           float* factors) {
  using Word = typename F::Word;
  constexpr bool kBFloat16 = Panel<F>::kBFloat16;
  bool grows = false;
  for (int lane = 0; lane < p.used * kWidth; lane += kWidth) {
    float* column = p.scores + lane;
    Vf maxima[4];
    for (Vf& m : maxima) m = splat(minus_infinity());
    int64_t k = 0;
    for (; k + 4 <= count; k += 4) {
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j)
        maxima[j] = max(load_vector(column + (k + j) * kPanel), maxima[j]);
    }
    for (; k < count; ++k) maxima[0] = max(load_vector(column + k * kPanel), maxima[0]);
    const Vf best = max(max(maxima[0], maxima[1]), max(maxima[2], maxima[3])) * splat(scale);
    const Vf before = load_vector(p.maximum + lane), now = max(best, before);
    const Vf reference = reference_of(now);
    const Vf factor = select(before == now, splat(1.0f), exp2_weight<6>(before - reference));
    grows = grows || any_lane(before != now);
    store_vector(factors + lane, factor);
    store_vector(p.maximum + lane, now);
    Vf sums[kSoftmaxLanes] = {};
    for (k = 0; k < count; k += 16) {
      if (k + 16 <= count) {
#pragma GCC unroll 8
        for (int j = 0; j < 16; j += 2) {
          const float* at = column + (k + j) * kPanel;
          const Vf even = softmax_weight<kBFloat16>(fma(load_vector(at), splat(scale), -reference));
          const Vf odd =
              softmax_weight<kBFloat16>(fma(load_vector(at + kPanel), splat(scale), -reference));
          Word* to = reinterpret_cast<Word*>(column) + (k + j) / F::kPerWord * kPanel;
          put_pair<F>(to, kPanel, even, odd);
          sums[j] += even;
          sums[j + 1] += odd;
        }
        continue;
      }
      for (int j = 0; k + j < count; j += 2) {
        const float* at = column + (k + j) * kPanel;
        const Vf even = softmax_weight<kBFloat16>(fma(load_vector(at), splat(scale), -reference));
        Vf odd = {};
        if (k + j + 1 < count) {
          odd = softmax_weight<kBFloat16>(fma(load_vector(at + kPanel), splat(scale), -reference));
        }
        Word* to = reinterpret_cast<Word*>(column) + (k + j) / F::kPerWord * kPanel;
        put_pair<F>(to, kPanel, even, odd);
        sums[j] += even;
        sums[j + 1] += odd;
      }
    }
    fold_lanes(sums);
    store_vector(p.l + lane, fma(load_vector(p.l + lane), factor, sums[0]));
  }
  return grows;
}

template <typename F>
inline void softmax_block(Panel<F>& p, int64_t count, int64_t dim, float scale) {
  alignas(64) float factors[kPanel];
  if (!weigh_block<F>(p, count, scale, factors)) return;
  for (int64_t d = 0; d < dim; ++d) {
    for (int lane = 0; lane < p.used * kWidth; lane += kWidth) {
      float* at = p.sums + d * kPanel + lane;
      store_vector(at, load_vector(at) * load_vector(factors + lane));
    }
  }
}

// Values that are not finite, and some lane does not see them: each lane by itself, with what it
// does not see left out.
template <typename F>
inline void add_values_apart(Panel<F>& p, const VideoAttention& a, int64_t start, int64_t count) {
  using Word = typename F::Word;
  const int64_t steps = words_of<F>(count, true), stride = round_up(a.dim, 16);
  for (int lane = 0; lane < p.lanes; ++lane) {
    bool seen[kKeyBlock];
    const Reach reach = p.reach.of(lane);
    for (int64_t k = 0; k < count; ++k) seen[k] = sees_slot(a.mask, reach, start + k);
    pack_rows_of<F>(a, true, start, count, seen, p.values);
#if defined(__AMX_BF16__)
    if constexpr (kTiled<F>) {
      lane_product(p.sums, lane, reinterpret_cast<const Word*>(p.scores), p.values, steps, a.dim);
      continue;
    }
#endif
    const Word* weights = reinterpret_cast<const Word*>(p.scores) + lane;
    for (int64_t d = 0; d < a.dim; ++d) {
      Vf sum = splat(p.sums[d * kPanel + lane]);
      for (int64_t s = 0; s < steps; ++s) {
        sum = F::multiply_add(spread<F>(weights[s * kPanel]),
                              F::broadcast(p.values + s * stride + d), sum);
      }
      p.sums[d * kPanel + lane] = sum[0];
    }
  }
}

}  // namespace
}  // namespace rlir::cpu
