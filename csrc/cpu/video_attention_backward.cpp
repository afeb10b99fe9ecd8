// Backward kernels. Formulas, order and bits: video_attention.h.
//
// A wide panel of queries stays while blocks of keys go by: scores again, P and dS of the block, in
// the three layouts that the three products behind them want. dq stays in the cache, dk and dv are
// added to in memory.
#include "cpu/attention.h"
#include "cpu/rows.h"

namespace rlir::cpu::RLIR_ISA {
namespace {

constexpr int kParts = kWidePanel / kPanel;  // panels of a wide one
static_assert(kWidePanel % kPanel == 0 && kWidePanel % 16 == 0);
// Words of a row along the lanes. Tiles take 32 lanes at a time: zeros fill the last group.
template <typename F>
constexpr int64_t kLaneWords = (kTiled<F> ? (kWidePanel + 31) / 32 * 32 : kWidePanel) / F::kPerWord;
constexpr int kDimVectors = 2;  // of a tile of dk or dv

// out[j][0 .. kUsed vectors) += sum over `steps` of rows[j] columns, a chain that begins with 0.
template <typename F, int kUsed>
__attribute__((noinline)) void row_tile(float* const* out, const typename F::Word* const* rows,
                                        const typename F::Word* columns, int64_t stride,
                                        int64_t steps) {
  Vf c[kRows][kUsed];
  const typename F::Word* at[kRows];
#pragma GCC unroll 8
  for (int j = 0; j < kRows; ++j) {
    at[j] = rows[j];
#pragma GCC unroll 2
    for (int i = 0; i < kUsed; ++i) c[j][i] = Vf{};
  }
  for (int64_t s = 0; s < steps; ++s) {
    typename F::Lanes lanes[kUsed];
#pragma GCC unroll 2
    for (int i = 0; i < kUsed; ++i) lanes[i] = F::load_lanes(columns + s * stride + i * kWidth);
#pragma GCC unroll 8
    for (int j = 0; j < kRows; ++j) {
      const typename F::Lanes value = F::broadcast(at[j] + s);
#pragma GCC unroll 2
      for (int i = 0; i < kUsed; ++i) c[j][i] = F::multiply_add(lanes[i], value, c[j][i]);
    }
  }
#pragma GCC unroll 8
  for (int j = 0; j < kRows; ++j) {
#pragma GCC unroll 2
    for (int i = 0; i < kUsed; ++i) {
      float* to = out[j] + i * kWidth;
      store_vector(to, load_vector(to) + c[j][i]);
    }
  }
}

template <typename F>
struct WidePanel {
  using Word = typename F::Word;
  static constexpr bool kBFloat16 = Panel<F>::kBFloat16;

  int64_t first;  // lane
  int lanes, parts;
  Panel<F> part[kParts];
  Word* grad[kParts];              // dout, [words][kPanel]
  float* grad_scores;              // [kBlockRows][kPanel]: dP of a part
  Word *p_rows, *ds_rows;          // [kKeyBlock][kLaneWords]: along the lanes
  Word *q_columns, *grad_columns;  // [lanes in words][dim padded]
  float *lse, *delta;              // [kWidePanel]
  float* unused;                   // a row that nobody reads
  Word* value_copy;
  float* tiles;  // [kKeyBlock][dim padded], of tiles: what a panel adds to dk or dv
};

template <typename F>
int64_t wide_floats(int64_t dim) {
  const int64_t words = round_up(words_for<F>(dim), 16), stride = round_up(dim, 16);
  return kParts * (panel_floats<F>(dim) + words * kPanel) + kBlockRows * kPanel +
         2 * kKeyBlock * kWidePanel + 2 * kWidePanel * stride + 2 * kWidePanel + stride +
         kKeyBlock * stride * (kTiled<F> ? 2 : 1);
}

template <typename F>
WidePanel<F> wide_panel_at(float* space, int64_t dim) {
  using Word = typename F::Word;
  const int64_t words = round_up(words_for<F>(dim), 16), stride = round_up(dim, 16);
  const auto take = [&space](int64_t n) {
    float* at = space;
    space += n;
    return at;
  };
  WidePanel<F> w;
  for (int i = 0; i < kParts; ++i) {
    w.part[i] = panel_at<F>(take(panel_floats<F>(dim)), dim);
    w.grad[i] = reinterpret_cast<Word*>(take(words * kPanel));
  }
  w.grad_scores = take(kBlockRows * kPanel);
  w.p_rows = reinterpret_cast<Word*>(take(kKeyBlock * kWidePanel));
  w.ds_rows = reinterpret_cast<Word*>(take(kKeyBlock * kWidePanel));
  w.q_columns = reinterpret_cast<Word*>(take(kWidePanel * stride));
  w.grad_columns = reinterpret_cast<Word*>(take(kWidePanel * stride));
  w.lse = take(kWidePanel);
  w.delta = take(kWidePanel);
  w.unused = take(stride);
  w.value_copy = reinterpret_cast<Word*>(take(kKeyBlock * stride));
  if constexpr (kTiled<F>) {
    w.tiles = take(kKeyBlock * stride);
    constexpr uint64_t kRow = sizeof(Word) * kLaneWords<F>;
    __builtin_memset(w.p_rows, 0, kRow * kKeyBlock);
    __builtin_memset(w.ds_rows, 0, kRow * kKeyBlock);
    __builtin_memset(w.q_columns, 0, kRow * static_cast<uint64_t>(stride));
    __builtin_memset(w.grad_columns, 0, kRow * static_cast<uint64_t>(stride));
  }
  return w;
}

float dot(Dtype dtype, const void* x, const void* y, int64_t n) {
  alignas(64) float a[256], b[256];
  load_row(a, x, dtype, 0, n);
  load_row(b, y, dtype, 0, n);
  Vf sums[kPer16] = {};
  for (int64_t i = 0; i < n; i += 16) {
    for (int part = 0; part < kPer16; ++part) {
      const int64_t at = i + part * kWidth;
      sums[part] = fma(load_vector(a + at), load_vector(b + at), sums[part]);
    }
  }
  alignas(64) float lanes[16];
  for (int part = 0; part < kPer16; ++part) store_vector(lanes + part * kWidth, sums[part]);
  fold_lanes(lanes);
  return lanes[0];
}

template <typename F>
void open(WidePanel<F>& w, const AttentionBackward& b, int64_t panel) {
  const VideoAttention& a = b.call;
  constexpr bool kBFloat16 = Panel<F>::kBFloat16;
  w.first = panel * kWidePanel;
  w.lanes = static_cast<int>(at_most(a.queries.lanes() - w.first, kWidePanel));
  w.parts = (w.lanes + kPanel - 1) / kPanel;
  for (int i = 0; i < w.parts; ++i) {
    load_queries(w.part[i], a, w.first + i * kPanel);
    clear_state(w.part[i], a.dim);
  }
  const void *q_row[kWidePanel] = {}, *grad_row[kWidePanel] = {};
  for (int i = 0; i < w.parts * kPanel; ++i) {
    w.lse[i] = w.delta[i] = 0.0f;
    if (i < w.lanes) {
      const LanePlace place = lane_place(a.queries, w.first + i);
      const Reach& reach = a.queries.reach[place.member * a.queries.tokens + place.token];
      if (reach.low < reach.high) {
        q_row[i] = element(kBFloat16, a.queries.q, place.at(a.queries.stride));
        grad_row[i] = element(kBFloat16, b.grad_out, place.at(b.grad_stride));
        const float lse = a.lse[place.at(a.lse_stride)];
        w.lse[i] = lse == minus_infinity() ? 0.0f : lse * 0x1.715476p+0f;
        const void* out =
            element(kBFloat16, static_cast<const void*>(a.out), place.at(a.out_stride));
        w.delta[i] = dot(kBFloat16 ? Dtype::kBFloat16 : Dtype::kFloat32, grad_row[i], out, a.dim);
        if (b.grad_lse != nullptr) w.delta[i] -= b.grad_lse[place.at(b.grad_lse_stride)];
      }
    }
  }
  for (int i = 0; i < w.parts * kPanel; i += kWidth) {
    put_lanes<F>(w.grad[i / kPanel], i % kPanel, grad_row + i, a.dim);
  }
  const int64_t stride = round_up(a.dim, 16);
  for (int i = 0; i < w.lanes; i += 2) {
    const int64_t at = i / F::kPerWord * stride;
    pair_rows<F>(w.q_columns + at, stride, q_row[i], q_row[i + 1], a.dim);
    pair_rows<F>(w.grad_columns + at, stride, grad_row[i], grad_row[i + 1], a.dim);
  }
}

// P and dS of a block and a part: rows along the lanes, and dS as columns along the keys.
template <typename F>
void weights_of_block(WidePanel<F>& w, int index, int64_t count, float scale) {
  using Word = typename F::Word;
  constexpr int kDegree = Panel<F>::kBFloat16 ? 4 : 6;
  Panel<F>& p = w.part[index];
  constexpr int64_t kRow = kLaneWords<F>;
  for (int lane = 0; lane < p.used * kWidth; lane += kWidth) {
    const int wide = index * kPanel + lane;
    const Vf lse = load_vector(w.lse + wide), delta = load_vector(w.delta + wide);
    for (int64_t k = 0; k < count; k += 2) {
      Vf ds[2] = {};
      for (int64_t j = 0; j < at_most(2, count - k); ++j) {
        const float* at = p.scores + (k + j) * kPanel + lane;
        const Vf weight = exp2_weight<kDegree>(fma(load_vector(at), splat(scale), -lse));
        const Vf dp = load_vector(w.grad_scores + (k + j) * kPanel + lane);
        // What is not seen has weight 0, and its dP may be anything.
        ds[j] = select(weight == Vf{}, Vf{}, weight * (dp - delta));
        F::put(w.p_rows + (k + j) * kRow, wide, F::rounded(weight));
        F::put(w.ds_rows + (k + j) * kRow, wide, F::rounded(ds[j]));
      }
      Word* column = reinterpret_cast<Word*>(p.scores) + k / F::kPerWord * kPanel + lane;
      put_pair<F>(column, kPanel, ds[0], ds[1]);
    }
  }
}

// sums[slot] += rows[slot] columns for the slots of a block.
template <typename F>
void add_rows(const WidePanel<F>& w, float* const* sums, const KeySource& keys, int64_t start,
              int64_t count, const typename F::Word* rows, const typename F::Word* columns,
              int64_t dim) {
  constexpr int64_t kRow = kLaneWords<F>;
  const int64_t stride = round_up(dim, 16), steps = words_of<F>(w.lanes, true);
#if defined(__AMX_BF16__)
  if constexpr (kTiled<F>) {
    const int64_t all = w.lanes == kWidePanel ? kRow : steps;
    for (int64_t d = 0; d < stride; d += kPanel) {
      tile_product(w.tiles + d, {stride, stride}, rows, kRow, count, columns + d, all,
                   static_cast<int>(at_most(kPanel, stride - d)), false, {});
    }
    for (int64_t k = 0; k < count; ++k) {
      const int64_t slot = start + k;
      float* to = slot < keys.count[0] ? sums[0] + slot * stride
                                       : sums[1] + (slot - keys.count[0]) * stride;
      for (int64_t d = 0; d < stride; d += kWidth) {
        store_vector(to + d, load_vector(to + d) + load_vector(w.tiles + k * stride + d));
      }
    }
    return;
  }
#endif
  for (int64_t k = 0; k < count; k += kRows) {
    const typename F::Word* from[kRows];
    float* row[kRows];
    for (int j = 0; j < kRows; ++j) {
      const int64_t slot = start + k + j;
      from[j] = rows + at_most(k + j, count - 1) * kRow;
      row[j] = k + j >= count         ? w.unused
               : slot < keys.count[0] ? sums[0] + slot * stride
                                      : sums[1] + (slot - keys.count[0]) * stride;
    }
    for (int64_t d = 0; d < stride; d += kDimVectors * kWidth) {
      float* to[kRows];
      for (int j = 0; j < kRows; ++j) to[j] = row[j] + d;
      if (d + kDimVectors * kWidth <= stride) {
        row_tile<F, kDimVectors>(to, from, columns + d, stride, steps);
      } else {
        row_tile<F, 1>(to, from, columns + d, stride, steps);
      }
    }
  }
}

template <typename F>
void backward(const AttentionBackward& b, int64_t panel, WidePanel<F>& w) {
  const VideoAttention& a = b.call;
  constexpr bool kBFloat16 = Panel<F>::kBFloat16;
  open(w, b, panel);
  int64_t first = INT64_MAX, last = 0, end = 0;
  for (int i = 0; i < w.parts; ++i) {
    const PanelReach& r = w.part[i].reach;
    if (r.most_high == 0) continue;
    first = at_most(first, r.first_block());
    last = r.last_block() > last ? r.last_block() : last;
    end = r.most_high > end ? r.most_high : end;
  }
  const int64_t words = words_for<F>(a.dim), stride = round_up(a.dim, 16);
  for (int64_t block = first; block < last; ++block) {
    const int64_t start = block * kKeyBlock, count = at_most(end - start, kKeyBlock);
    const Rows<F> keys = block_rows<F>(a.keys, false, start, count, a.dim, false, w.part[0].copy);
    const Rows<F> values = block_rows<F>(a.keys, true, start, count, a.dim, false, w.value_copy);
    bool all = true, seen[kKeyBlock] = {};
    for (int i = 0; i < w.parts; ++i) {
      Panel<F>& p = w.part[i];
      panel_product<F>(p.scores, keys.first, keys.stride, count, p.q, words, p.lanes, false);
      panel_product<F>(w.grad_scores, values.first, values.stride, count, w.grad[i], words, p.lanes,
                       false);
      bool here[kKeyBlock];
      if (mask_scores(a.mask, p.reach, start, count, p.used, p.scores, here)) {
        for (int64_t k = 0; k < count; ++k) seen[k] |= here[k];
        all = false;
      } else {
        for (int64_t k = 0; k < count; ++k) seen[k] = true;
      }
      weights_of_block(w, i, count, a.scale);
    }
    add_rows(w, b.sums.v, a.keys, start, count, w.p_rows, w.grad_columns, a.dim);
    add_rows(w, b.sums.k, a.keys, start, count, w.ds_rows, w.q_columns, a.dim);
    pack_rows_of<F>(a, false, start, count, all ? nullptr : seen, w.part[0].values);
    for (int i = 0; i < w.parts; ++i) {
      Panel<F>& p = w.part[i];
      add_columns<F>(p.sums, reinterpret_cast<const typename F::Word*>(p.scores), w.part[0].values,
                     stride, words_of<F>(count, true), a.dim, p.used);
    }
  }
  for (int lane = 0; lane < w.lanes; lane += kWidth) {
    void* rows[kWidth] = {};
    for (int i = lane; i < at_most(lane + kWidth, w.lanes); ++i) {
      const LanePlace place = lane_place(a.queries, w.first + i);
      rows[i - lane] = element(kBFloat16, b.dq, place.at(b.dq_stride));
    }
    store_lanes<kBFloat16>(rows, w.part[lane / kPanel].sums, lane % kPanel, a.dim,
                           splat(b.natural_scale));
  }
}

template <typename F>
void backwards(const AttentionBackward& b, int64_t begin, int64_t end, float* scratch) {
  const ProductScope<F> scope;
  WidePanel<F> w = wide_panel_at<F>(scratch, b.call.dim);
  for (int64_t panel = begin; panel < end; ++panel) backward(b, panel, w);
}

}  // namespace

int64_t attend_backward_scratch(bool bfloat16, int64_t dim) {
  return 4 * (bfloat16 ? wide_floats<BFloat16Words>(dim) : wide_floats<Plain>(dim));
}

void attend_backward(const AttentionBackward& b, int64_t begin, int64_t end, void* scratch) {
  float* space = static_cast<float*>(scratch);
  b.call.bfloat16 ? backwards<BFloat16Words>(b, begin, end, space)
                  : backwards<Plain>(b, begin, end, space);
}

void store_key_gradients(bool bfloat16, const float* sums, int64_t shares, int64_t share,
                         int64_t dim, float factor, void* out, int64_t stride, int64_t begin,
                         int64_t end) {
  const int64_t padded = attention_stride(dim);
  alignas(64) float row[256];
  for (int64_t slot = begin; slot < end; ++slot) {
    for (int64_t d = 0; d < dim; d += kWidth) {
      Vf sum = load_vector(sums + slot * padded + d);
      for (int64_t i = 1; i < shares; ++i) sum += load_vector(sums + i * share + slot * padded + d);
      store_vector(row + d, sum * splat(factor));
    }
    store_row(out, bfloat16 ? Dtype::kBFloat16 : Dtype::kFloat32, slot * stride, row, dim);
  }
}

}  // namespace rlir::cpu::RLIR_ISA
