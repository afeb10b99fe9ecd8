// What the kernels of the attention ops are made of: panels of queries, blocks of keys. Formulas,
// order and bits: cpu/video_attention.h. Formats are those of cpu/words.h. One file, and a long
// one: it is a panel's way from queries to results. Beside it: cpu/attention_seen.h (masks),
// attention_lanes.h (rows to lanes and back), attention_tiles.h (AMX).
//
// Internal linkage: compiled once per instruction set.
#pragma once

#include "core/exp2.h"
#include "cpu/attention_lanes.h"
#include "cpu/attention_seen.h"
#include "cpu/softmax.h"
#include "cpu/video_attention.h"
#include "cpu/words.h"

#if defined(__AMX_BF16__)
#include "cpu/attention_tiles.h"
#endif

namespace rlir::cpu {
namespace {  // nothing here may be shared between instruction sets

constexpr int64_t kBlockRows = kKeyBlock + kRowPad;  // of a panel's scores, as a product writes
constexpr float kLn2 = 0x1.62e430p-1f;

inline int64_t padded_dim(int64_t dim) { return round_up(dim, 16) + kRowPad; }

// Element `at` of a tensor of the call's dtype.
inline const void* element(bool bfloat16, const void* x, int64_t at) {
  return static_cast<const char*>(x) + at * (bfloat16 ? 2 : 4);
}
inline void* element(bool bfloat16, void* x, int64_t at) {
  return static_cast<char*>(x) + at * (bfloat16 ? 2 : 4);
}

// --- Words of rows -------------------------------------------------------------------------------

// Rows for the broadcast side of a product: where they lie, or a copy.
template <typename F>
struct Rows {
  const typename F::Word* first;
  int64_t stride;
};

// What holds slots [start, start + count) if they lie in one segment.
inline int segment_of(const KeySource& s, int64_t start, int64_t count) {
  if (start + count <= s.count[0]) return 0;
  return start >= s.count[0] ? 1 : -1;
}

inline const void* slot_row(bool bfloat16, const KeySource& s, bool values, int64_t slot) {
  const int part = slot < s.count[0] ? 0 : 1;
  const int64_t at = part == 0 ? slot : slot - s.count[0];
  return values ? element(bfloat16, s.v[part], at * s.v_stride[part])
                : element(bfloat16, s.k[part], at * s.k_stride[part]);
}

// Keys (or values) of a block as words along d; `copies`: even where they could stay.
template <typename F>
inline Rows<F> block_rows(const KeySource& s, bool values, int64_t start, int64_t count,
                          int64_t dim, bool copies, void* copy) {
  using Word = typename F::Word;
  constexpr int64_t kPer = F::kPerWord;
  constexpr bool kBFloat16 = kPer == 2 || F::kSwapped;
  const int part = segment_of(s, start, count);
  if (!F::kSwapped && part >= 0 && dim % kPer == 0) {
    const int64_t stride = values ? s.v_stride[part] : s.k_stride[part];
    const void* first = slot_row(kBFloat16, s, values, start);
    if (stride == dim) copies = false;  // they lie together
    if (!copies && stride % kPer == 0 && reinterpret_cast<uintptr_t>(first) % sizeof(Word) == 0) {
      return {static_cast<const Word*>(first), stride / kPer};
    }
  }
  const int64_t words = words_for<F>(dim);
  Word* to = static_cast<Word*>(copy);
  for (int64_t i = 0; i < count; ++i) {
    const void* row = slot_row(kBFloat16, s, values, start + i);
    if (!F::kSwapped && dim % kPer == 0) {
      __builtin_memcpy(to + i * words, row, static_cast<uint64_t>(words) * sizeof(Word));
      continue;
    }
    for (int64_t w = 0; w < words; ++w) to[i * words + w] = row_word<F>(row, w, dim);
  }
  return {to, words};
}

// --- Columns: words along key slots (or along queries)
// --------------------------------------------

// Rows x0 and x1 [n] of two neighbouring slots as words; null is a row of zeros. Both rows of words
// are written. n elements, and of the words those up to a multiple of 16.
template <typename F>
inline void pair_rows(typename F::Word* out, int64_t stride, const void* x0, const void* x1,
                      int64_t n) {
  if constexpr (F::kPerWord == 2) {
    const auto *a = static_cast<const uint16_t*>(x0), *b = static_cast<const uint16_t*>(x1);
    int64_t i = 0;
#if defined(__AVX512BF16__)
    if (a != nullptr && b != nullptr) {
      const __m512i lower = (__m512i)(kLaneNumbers | (kLaneNumbers + 32) << 16);
      const __m512i upper = (__m512i)((kLaneNumbers + 16) | (kLaneNumbers + 48) << 16);
      for (; i + 32 <= n; i += 32) {
        __m512i even, odd;
        __builtin_memcpy(&even, a + i, sizeof even);
        __builtin_memcpy(&odd, b + i, sizeof odd);
        store_vector(reinterpret_cast<float*>(out + i),
                     (Vf)_mm512_permutex2var_epi16(even, lower, odd));
        store_vector(reinterpret_cast<float*>(out + i + 16),
                     (Vf)_mm512_permutex2var_epi16(even, upper, odd));
      }
    }
    for (; i + 16 <= n; i += 16) {
      __m256i low = {}, high = {};
      if (a != nullptr) __builtin_memcpy(&low, a + i, sizeof low);
      if (b != nullptr) __builtin_memcpy(&high, b + i, sizeof high);
      const __m512i word = _mm512_or_si512(
          _mm512_maskz_cvtepu16_epi32(0xffff, low),
          _mm512_maskz_slli_epi32(0xffff, _mm512_maskz_cvtepu16_epi32(0xffff, high), 16));
      __builtin_memcpy(out + i, &word, sizeof word);
    }
#endif
    for (; i < n; ++i) {
      out[i] = (a != nullptr ? uint32_t{a[i]} : 0u) | (b != nullptr ? uint32_t{b[i]} << 16 : 0u);
    }
    for (; i % 16 != 0; ++i) out[i] = 0;
  } else {
    typename F::Word *first = F::kSwapped ? out + stride : out,
                     *second = F::kSwapped ? out : out + stride;
    const auto value = [](const void* x, int64_t i) {
      if (x == nullptr) return 0.0f;
      if constexpr (F::kSwapped) return float_of(static_cast<const uint16_t*>(x)[i]);
      return static_cast<const float*>(x)[i];
    };
    for (int64_t i = 0; i < round_up(n, 16); ++i) {
      first[i] = i < n ? value(x0, i) : 0.0f;
      second[i] = i < n ? value(x1, i) : 0.0f;
    }
  }
}

// Two vectors of neighbouring slots as words.
template <typename F>
inline void put_pair(typename F::Word* out, int64_t stride, Vf even, Vf odd) {
#if defined(__AVX512BF16__)
  if constexpr (F::kPerWord == 2) {
    alignas(64) static const uint16_t kInterleave[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                         21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                         11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    __m512i order;
    __builtin_memcpy(&order, kInterleave, sizeof order);
    const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
    const __m512i word = _mm512_maskz_permutexvar_epi16(~__mmask32{0}, order, halves);
    __builtin_memcpy(out, &word, sizeof word);
    return;
  }
#endif
  const Vf first = F::rounded(F::kSwapped ? odd : even),
           second = F::rounded(F::kSwapped ? even : odd);
  store_vector(reinterpret_cast<float*>(out), first);
  store_vector(reinterpret_cast<float*>(out) + stride, second);
}

// sums[d][lanes] += over `steps` words: column [steps][kPanel] of the lanes, words v
// [steps][stride] of d broadcast. Rows d .. d + kRows - 1; past the last one it is repeated, into
// unused space.
template <typename F, int kUsed>
__attribute__((noinline)) void column_tile(float* sums, const typename F::Word* column,
                                           const typename F::Word* const* v, int64_t stride,
                                           int64_t steps) {
  Vf c[kRows][kUsed];
  const typename F::Word* at[kRows];
#pragma GCC unroll 8
  for (int j = 0; j < kRows; ++j) {
    at[j] = v[j];
#pragma GCC unroll 4
    for (int i = 0; i < kUsed; ++i) c[j][i] = load_vector(sums + j * kPanel + i * kWidth);
  }
  for (int64_t s = 0; s < steps; ++s) {
    typename F::Lanes lanes[kUsed];
#pragma GCC unroll 4
    for (int i = 0; i < kUsed; ++i) lanes[i] = F::load_lanes(column + s * kPanel + i * kWidth);
#pragma GCC unroll 8
    for (int j = 0; j < kRows; ++j) {
      const typename F::Lanes value = F::broadcast(at[j] + s * stride);
#pragma GCC unroll 4
      for (int i = 0; i < kUsed; ++i) c[j][i] = F::multiply_add(lanes[i], value, c[j][i]);
    }
  }
#pragma GCC unroll 8
  for (int j = 0; j < kRows; ++j) {
#pragma GCC unroll 4
    for (int i = 0; i < kUsed; ++i) store_vector(sums + j * kPanel + i * kWidth, c[j][i]);
  }
}

template <typename F>
inline typename F::Lanes spread(typename F::Word word) {
  return F::broadcast(&word);
}

template <typename F>
inline void add_columns(float* sums, const typename F::Word* column, const typename F::Word* v,
                        int64_t stride, int64_t steps, int64_t dim, int used) {
#if defined(__AMX_BF16__)
  if constexpr (kTiled<F>) {
    return tile_product(sums, {kPanel, kPanel}, v, kColumnWords, dim, column, steps, used * kWidth,
                        true, {});
  }
#endif
  for (int64_t d = 0; d < dim; d += kRows) {
    const typename F::Word* rows[kRows];
    for (int j = 0; j < kRows; ++j) rows[j] = v + at_most(d + j, dim - 1);
    float* to = sums + d * kPanel;
    if (used >= kVectors) {
      column_tile<F, kVectors>(to, column, rows, stride, steps);
    } else if (kVectors > 3 && used == 3) {
      column_tile<F, 3>(to, column, rows, stride, steps);
    } else if (used == 2) {
      column_tile<F, 2>(to, column, rows, stride, steps);
    } else {
      column_tile<F, 1>(to, column, rows, stride, steps);
    }
  }
}

// --- A panel of queries --------------------------------------------------------------------------

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
  constexpr int kDegree = Panel<F>::kBFloat16 ? 4 : 6;
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
          const Vf even = exp2_weight<kDegree>(fma(load_vector(at), splat(scale), -reference));
          const Vf odd =
              exp2_weight<kDegree>(fma(load_vector(at + kPanel), splat(scale), -reference));
          Word* to = reinterpret_cast<Word*>(column) + (k + j) / F::kPerWord * kPanel;
          put_pair<F>(to, kPanel, even, odd);
          sums[j] += even;
          sums[j + 1] += odd;
        }
        continue;
      }
      for (int j = 0; k + j < count; j += 2) {
        const float* at = column + (k + j) * kPanel;
        const Vf even = exp2_weight<kDegree>(fma(load_vector(at), splat(scale), -reference));
        Vf odd = {};
        if (k + j + 1 < count) {
          odd = exp2_weight<kDegree>(fma(load_vector(at + kPanel), splat(scale), -reference));
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

// A block of PackedKeys: keys lie together (as they are, their rows may fall on a few lines of the
// first level cache), values are turned, and it is said whether these are finite.
template <typename F>
struct PackedBlock {
  using Word = typename F::Word;
  Word *k, *v, *finite;

  PackedBlock(char* at, int64_t dim)
      : k(reinterpret_cast<Word*>(at)), v(k + key_words(dim)), finite(v + value_words(dim)) {}
  static int64_t key_words(int64_t dim) { return round_up(kKeyBlock * words_for<F>(dim), 16); }
  static int64_t value_words(int64_t dim) { return kKeyBlock / F::kPerWord * round_up(dim, 16); }
  static int64_t bytes(int64_t dim) { return 4 * (key_words(dim) + value_words(dim) + 16); }
};

template <typename F>
inline void pack_block(const VideoAttention& a, int64_t block, char* to) {
  const PackedBlock<F> packed(to, a.dim);
  const int64_t start = block * kKeyBlock;
  const int64_t count = at_most(a.keys.count[0] + a.keys.count[1] - start, kKeyBlock);
  const Rows<F> keys = block_rows<F>(a.keys, false, start, count, a.dim, true, packed.k);
  if (keys.first != packed.k) {
    __builtin_memcpy(packed.k, keys.first,
                     static_cast<uint64_t>(count * words_for<F>(a.dim)) * sizeof *packed.k);
  }
  bool everything[kKeyBlock];
  for (bool& x : everything) x = true;
  *packed.finite = pack_rows_of<F>(a, true, start, count, everything, packed.v) ? 1 : 0;
}

// What panels that go over a block one after the other share of it.
template <typename F>
struct SharedBlock {
  using Word = typename F::Word;
  Rows<F> keys;
  const Word* values = nullptr;
  bool finite = false;

  SharedBlock(const VideoAttention& a, int64_t block, int64_t count, bool several, Word* copy) {
    if (a.packed.part[0] == nullptr) {
      keys = block_rows<F>(a.keys, false, block * kKeyBlock, count, a.dim, several, copy);
      return;
    }
    const int part = block < a.packed.border ? 0 : 1;
    const int64_t at = part == 0 ? block : block - a.packed.border;
    const PackedBlock<F> packed(
        const_cast<char*>(a.packed.part[part]) + at * PackedBlock<F>::bytes(a.dim), a.dim);
    keys = {packed.k, words_for<F>(a.dim)};
    values = packed.v;
    finite = *packed.finite != 0;
  }
};

#if defined(__AMX_BF16__)
// Sums [dim][kPanel] of the first kTile lanes as rows [kTile][dim padded], or back.
inline void turn_sums(float* sums, float* rows, int64_t dim, bool to_rows) {
  const int64_t stride = round_up(dim, kTile);
  for (int64_t d = 0; d < dim; d += kTile) {
    Vf square[kTile];
    for (int i = 0; i < kTile; ++i) {
      square[i] = load_vector(to_rows ? sums + (d + i) * kPanel : rows + i * stride + d);
    }
    transpose(square);
    for (int i = 0; i < kTile; ++i) {
      store_vector(to_rows ? rows + i * stride + d : sums + (d + i) * kPanel, square[i]);
    }
  }
}

// attend_blocks of one panel of a single vector of lanes, as in decoding. Values are read once: it
// is the weights that are turned, and values lie by pairs. A tdpbf16ps does not tell its operands
// apart, so that the bits are the same.
template <typename F>
inline void attend_few(Panel<F>& p, const VideoAttention& a, int64_t begin, int64_t end) {
  constexpr int64_t kWords = kKeyBlock / 2;
  const int64_t words = words_for<F>(a.dim), stride = round_up(a.dim, kTile);
  alignas(64) float sums[kTile * 256];
  alignas(64) uint32_t weights[kTile * kWords];
  turn_sums(p.sums, sums, a.dim, true);
  for (int64_t block = begin; block < end; ++block) {
    const int64_t start = block * kKeyBlock;
    const int64_t count = at_most(p.reach.most_high - start, kKeyBlock);
    const Rows<F> keys = block_rows<F>(a.keys, false, start, count, a.dim, false, p.copy);
    panel_product<F>(p.scores, keys.first, keys.stride, count, p.q, words, p.lanes, false);
    bool seen[kKeyBlock];
    const bool all = !mask_scores(a.mask, p.reach, start, count, p.used, p.scores, seen);
    alignas(64) float factors[kPanel];
    if (weigh_block<F>(p, count, a.scale, factors)) {
      for (int64_t i = 0; i < p.lanes * stride; i += kWidth) {
        store_vector(sums + i, load_vector(sums + i) * splat(factors[i / stride]));
      }
    }
    const auto row_of = [&](int64_t k) -> const void* {
      return k < count && (all || seen[k]) ? slot_row(true, a.keys, true, start + k) : nullptr;
    };
    if (!pack_pairs<F>(row_of, count, a.dim, !all, p.values)) {
      turn_sums(p.sums, sums, a.dim, false);
      add_values_apart<F>(p, a, start, count);
      turn_sums(p.sums, sums, a.dim, true);
      continue;
    }
    const int64_t steps = words_of<F>(count, true);
    for (int64_t w = 0; w < steps; w += kTile) {
      Vf square[kTile];
      for (int i = 0; i < kTile; ++i) square[i] = load_vector(p.scores + (w + i) * kPanel);
      transpose(square);
      for (int i = 0; i < kTile; ++i) {
        store_vector(reinterpret_cast<float*>(weights + i * kWords + w), square[i]);
      }
    }
    memory_is_written();
    for (int64_t d = 0; d < stride; d += 3 * kTile) {
      tile_product(sums + d, {stride, stride}, weights, kWords, p.lanes, p.values + d, steps,
                   static_cast<int>(at_most(3 * kTile, stride - d)), true, {});
    }
  }
  turn_sums(p.sums, sums, a.dim, false);
}
#endif

// Blocks [first, last) of those that the panels see, one after the other.
template <typename F>
inline void attend_blocks(Panel<F>* panels, int panel_count, const VideoAttention& a, int64_t first,
                          int64_t last) {
  int64_t begin = INT64_MAX, end = 0, high = 0;
  for (int i = 0; i < panel_count; ++i) {
    const PanelReach& r = panels[i].reach;
    begin = r.first_block() < begin ? r.first_block() : begin;
    end = r.last_block() > end ? r.last_block() : end;
    high = r.most_high > high ? r.most_high : high;
  }
  begin = first > begin ? first : begin;
  end = at_most(last, end);
#if defined(__AMX_BF16__)
  if constexpr (kTiled<F>) {
    if (panel_count == 1 && panels[0].used == 1 && a.packed.part[0] == nullptr) {
      return attend_few<F>(panels[0], a, begin, end);
    }
  }
#endif
  const int64_t words = words_for<F>(a.dim), stride = round_up(a.dim, 16);
  for (int64_t block = begin; block < end; ++block) {
    const int64_t start = block * kKeyBlock;
    const int64_t most = at_most(high - start, kKeyBlock);
    SharedBlock<F> shared(a, block, most, panel_count > 1, panels[0].copy);
    for (int i = 0; i < panel_count; ++i) {
      Panel<F>& p = panels[i];
      if (block < p.reach.first_block() || block >= p.reach.last_block()) continue;
      const int64_t count = at_most(p.reach.most_high - start, kKeyBlock);
      panel_product<F>(p.scores, shared.keys.first, shared.keys.stride, count, p.q, words,
                       static_cast<int>(p.lanes), false);
      bool seen[kKeyBlock];
      const bool all = !mask_scores(a.mask, p.reach, start, count, p.used, p.scores, seen);
      softmax_block<F>(p, count, a.dim, a.scale);
      if (shared.values == nullptr && panel_count > 1) {
        bool everything[kKeyBlock];
        for (bool& x : everything) x = true;
        shared.finite = pack_rows_of<F>(a, true, start, most, everything, p.values);
        shared.values = p.values;
      }
      const typename F::Word* values = shared.values;
      if (!shared.finite) {
        // Rows that nobody sees are left out: they may be anything.
        const bool finite = pack_rows_of<F>(a, true, start, count, all ? nullptr : seen, p.values);
        if (!finite) {
          add_values_apart<F>(p, a, start, count);
          continue;
        }
        values = p.values;
      }
      add_columns<F>(p.sums, reinterpret_cast<const typename F::Word*>(p.scores), values, stride,
                     words_of<F>(count, true), a.dim, p.used);
    }
  }
}

template <typename F>
inline void finish(const Panel<F>& p, const VideoAttention& a, int64_t first) {
  constexpr bool kBFloat16 = Panel<F>::kBFloat16;
  for (int lane = 0; lane < p.lanes; lane += kWidth) {
    void* rows[kWidth] = {};
    for (int i = lane; i < at_most(lane + kWidth, p.lanes); ++i) {
      const LanePlace place = lane_place(a.queries, first + i);
      rows[i - lane] = element(kBFloat16, a.out, place.at(a.out_stride));
      if (a.lse == nullptr) continue;
      const double natural = 0x1.62e42fefa39efp-1 * static_cast<double>(p.maximum[i]);
      a.lse[place.at(a.lse_stride)] =
          p.l[i] == 0.0f ? minus_infinity()  // it saw nothing
                         : static_cast<float>(natural + log(static_cast<double>(p.l[i])));
    }
    const Vf l = load_vector(p.l + lane);
    const Vf factors = select(l == Vf{}, Vf{}, splat(1.0f) / l);
    store_lanes<kBFloat16>(rows, p.sums, lane, a.dim, factors);
  }
}

}  // namespace
}  // namespace rlir::cpu
