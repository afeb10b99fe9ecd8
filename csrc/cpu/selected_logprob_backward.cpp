// Backward kernels of selected_logprob. Formulas, tiles and bits: selected_logprob.h.
//
// A chunk of the vocabulary at a time, for all rows: the tile of logits is computed again and
// turned into dz, which is kept in two layouts. For dhidden, rows are lanes and the chunk's columns
// are k: dz is the panel and the transposed weight the broadcast side; the sums over the vocabulary
// go on in float32 from chunk to chunk. For dweight, h is in the lanes and rows are k: dz is the
// broadcast side, `hidden` the panel; a chunk's dweight is finished when the chunk is.
#include "cpu/head.h"
#include "cpu/selected_logprob.h"

namespace rlir::cpu::RLIR_ISA {
namespace {

// dz of a tile is written here by pairs of columns; a word holds one value or two.
template <typename Format>
struct Layouts {
  typename Format::Word* panel;  // [words of columns][kPanel], of the tile's panel
  typename Format::Word* rows;   // [columns][row_words], of the whole chunk
  int64_t row_words;
};

int64_t chunk_columns(const HeadGradient& g) { return (g.block_end - g.block_begin) * kHeadBlock; }

template <typename Format>
Layouts<Format> layouts_of(const HeadGradient& g, int64_t panel) {
  using Word = typename Format::Word;
  const int64_t words = chunk_columns(g) / Format::kPerWord;
  return {static_cast<Word*>(g.chunk_panels) + panel * words * kPanel,
          static_cast<Word*>(g.chunk_rows), padded_rows(g.head) / Format::kPerWord};
}

// Neighbouring lanes exchanged.
inline Vf swap_pairs(Vf v) {
  Vf out;
  for (int i = 0; i < kWidth; ++i) out[i] = v[i ^ 1];
  return out;
}

// Rounded to bfloat16 as vdpbf16ps's operands are: to nearest, ties to even; NaN stays NaN.
inline Vf round_to_bfloat16(Vf v) {
  const Vi bits = (Vi)v;
  const Vi rounded = (bits + 0x7fff + ((bits >> 16) & 1)) & static_cast<int32_t>(0xffff0000u);
  return select(v == v, (Vf)rounded, v);
}

// Columns v and v + 1 (v even, relative to the chunk) of dz, kWidth rows from `lane` of a panel.
inline void put(const Layouts<FloatFormat>& to, bool rounds, int64_t panel, int64_t v, int lane,
                Vf even, Vf odd) {
  if (rounds) {
    even = round_to_bfloat16(even);
    odd = round_to_bfloat16(odd);
  }
  const int64_t swap = rounds ? 1 : 0;
  store_vector(to.panel + (v ^ swap) * kPanel + lane, even);
  store_vector(to.panel + ((v + 1) ^ swap) * kPanel + lane, odd);
  float* row = to.rows + v * to.row_words + panel * kPanel + lane;
  store_vector(row, rounds ? swap_pairs(even) : even);
  store_vector(row + to.row_words, rounds ? swap_pairs(odd) : odd);
}

#if defined(__AVX512BF16__)
inline void put(const Layouts<PairFormat>& to, bool, int64_t panel, int64_t v, int lane, Vf even,
                Vf odd) {
  const __m256i low = (__m256i)_mm512_cvtneps_pbh((__m512)even);
  const __m256i high = (__m256i)_mm512_cvtneps_pbh((__m512)odd);
  const __m512i words = _mm512_or_si512(_mm512_cvtepu16_epi32(low),
                                        _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
  _mm512_storeu_si512(to.panel + v / 2 * kPanel + lane, words);
  uint32_t* row = to.rows + v * to.row_words + (panel * kPanel + lane) / 2;
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(row), low);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(row + to.row_words), high);
}
#endif

// What dz needs to know of kWidth rows.
struct Rows {
  Vf max, log_sum, scale;  // scale = 1 / s
  Vf logprob, entropy;  // coefficients: dlogprob / T (0 where the target is outside), dentropy / T
  Vf mean;              // the entropy
  Vi valid;
};

// The gradient that reaches the target's column: 0 if it is outside of the support.
float target_gradient(const HeadGradient& g, int64_t row) {
  const Head& a = g.head;
  if (g.grad_logprob == nullptr) return 0.0f;
  const int64_t token = a.targets[row * a.target_stride];
  bool in = token >= a.low && token < a.high;
  if (in && a.support != nullptr) {
    in = (a.support[row * a.support_stride + token / 8] >> (token % 8) & 1) != 0;
  }
  return in ? g.grad_logprob[row * g.grad_logprob_stride] / a.temperature : 0.0f;
}

Rows rows_at(const HeadGradient& g, int64_t first) {
  const Head& a = g.head;
  Rows r = {};
  for (int i = 0; i < kWidth && first + i < a.rows; ++i) {
    const int64_t row = first + i;
    r.max[i] = a.stats[row];
    r.log_sum[i] = a.stats[a.rows + row];
    r.scale[i] = a.stats[2 * a.rows + row];
    r.logprob[i] = target_gradient(g, row);
    if (g.grad_entropy != nullptr) {
      r.entropy[i] = g.grad_entropy[row * g.grad_entropy_stride] / a.temperature;
      r.mean[i] = a.entropy[row];
    }
    r.valid[i] = -1;
  }
  return r;
}

// -p (dlogprob + dentropy (log p + entropy)), without the target's own term.
inline Vf gradient_of(const Rows& r, Vf z) {
  const Vf below = z - r.max;
  const Vf p = exp(below) * r.scale;
  const Vf logp = select(p > Vf{}, below - r.log_sum, Vf{});
  return -p * fma(r.entropy, logp + r.mean, r.logprob);
}

// z of kWidth rows and the columns of a block becomes dz.
void gradient_tile(const Rows& r, const Columns& columns, float* z) {
  for (int64_t v = columns.begin; v < columns.end; ++v) {
    const Vf dz = gradient_of(r, load_vector(z + v * kPanel));
    store_vector(z + v * kPanel, select(r.valid != Vi{}, dz, Vf{}));
  }
}

template <typename Format>
void tiles(const HeadGradient& g, int64_t panel_begin, int64_t panel_end, int64_t block_begin,
           int64_t block_end, void* scratch) {
  const ProductScope<Format> scope;
  const Head& a = g.head;
  float* z = static_cast<float*>(scratch);
  for (int64_t block = block_begin; block < block_end; ++block) {
    const Columns columns = columns_of(a, block);
    const int64_t start = block * kHeadBlock, in_chunk = start - g.block_begin * kHeadBlock;
    const auto weight = weight_rows<Format>(a, start + columns.begin, start + columns.end,
                                            static_cast<char*>(scratch) + tile_bytes());
    for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
      logits_tile(a, panel, block, columns, weight, z);
      scale_and_mask(a, panel, block, columns, z);
      const int64_t first = panel * kPanel;
      for (int lane = 0; lane < kPanel; lane += kWidth) {
        gradient_tile(rows_at(g, first + lane), columns, z + lane);
      }
      for (int64_t lane = 0; lane < at_most(a.rows - first, kPanel); ++lane) {
        const int64_t v = a.targets[(first + lane) * a.target_stride] - start;
        if (v >= columns.begin && v < columns.end) {
          z[v * kPanel + lane] += target_gradient(g, first + lane);
        }
      }
      for (int64_t v = 0; v < columns.begin; ++v) {
        __builtin_memset(z + v * kPanel, 0, sizeof(float) * kPanel);
      }
      for (int64_t v = columns.end; v < kHeadBlock; ++v) {
        __builtin_memset(z + v * kPanel, 0, sizeof(float) * kPanel);
      }
      const Layouts<Format> to = layouts_of<Format>(g, panel);
      for (int64_t v = 0; v < kHeadBlock; v += 2) {
        for (int lane = 0; lane < kPanel; lane += kWidth) {
          put(to, swaps(a), panel, in_chunk + v, lane, load_vector(z + v * kPanel + lane),
              load_vector(z + (v + 1) * kPanel + lane));
        }
      }
      if (g.bias_sums == nullptr) continue;
      // Row n of a group goes to accumulator n mod 16, in order.
      float* sums =
          g.bias_sums + (first / kHeadGroup * chunk_columns(g) + in_chunk) * kSoftmaxLanes;
      const bool fresh = first % kHeadGroup == 0;
      for (int64_t v = 0; v < kHeadBlock; ++v) {
        for (int lane = 0; lane < kPanel; lane += kWidth) {
          float* to_sum = sums + v * kSoftmaxLanes + lane % kSoftmaxLanes;
          const Vf before = fresh && lane < kSoftmaxLanes ? Vf{} : load_vector(to_sum);
          store_vector(to_sum, before + load_vector(z + v * kPanel + lane));
        }
      }
    }
  }
}

// The chunk's columns that dhidden sums over: chains start where they would with all columns.
Columns chunk_range(const HeadGradient& g) {
  const int64_t start = g.block_begin * kHeadBlock;
  const int64_t low = g.head.low > start ? g.head.low - start : 0;
  return {low / kChain * kChain, at_most(g.head.high - start, chunk_columns(g))};
}

template <typename Format>
void weight_t(const HeadGradient& g, int64_t begin, int64_t end) {
  using Word = typename Format::Word;
  const Head& a = g.head;
  const Columns range = chunk_range(g);
  const int64_t first = g.block_begin * kHeadBlock + range.begin;
  const int64_t stride = chunk_columns(g) / Format::kPerWord;
  const int64_t size = a.weight.dtype == Dtype::kFloat32 ? 4 : 2;
  Matrix w = a.weight;  // from the first column on
  w.data = static_cast<const char*>(w.data) + first * w.major_stride * size;
  Word* rows = static_cast<Word*>(g.chunk_weight);
  pack_rows<Format>(rows + begin * stride, stride, w, false, begin, end, range.end - range.begin,
                    swaps(a));
  // Columns below vocab_range are not to be looked at: 0 times infinity is NaN.
  for (int64_t h = begin; h < end; ++h) {
    for (int64_t k = 0; k < a.low - first; ++k) {
      if constexpr (Format::kPerWord == 2) {
        rows[h * stride + k / 2] &= k % 2 == 0 ? 0xffff0000u : 0x0000ffffu;
      } else {
        rows[h * stride + (swaps(a) ? k ^ 1 : k)] = 0.0f;
      }
    }
  }
}

static_assert(kHeadStep % kRowPad == 0);  // or neighbouring tasks would share a tile

template <typename Format>
void hidden_tiles(const HeadGradient& g, int64_t panel_begin, int64_t panel_end, int64_t begin,
                  int64_t end, void*) {
  const ProductScope<Format> scope;
  using Word = typename Format::Word;
  const Head& a = g.head;
  const Columns range = chunk_range(g);
  const int64_t words = words_of<Format>(range.end - range.begin, swaps(a));
  const int64_t stride = chunk_columns(g) / Format::kPerWord;
  const Word* rows = static_cast<const Word*>(g.chunk_weight);
  for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
    const Word* dz = layouts_of<Format>(g, panel).panel + range.begin / Format::kPerWord * kPanel;
    float* sums = g.grad_panels + panel * round_up(a.depth, kRowPad) * kPanel;
    const int lanes = static_cast<int>(at_most(a.rows - panel * kPanel, kPanel));
    for (int64_t h = begin; h < end; h += kRowPad) {
      panel_product<Format>(sums + h * kPanel, rows + h * stride, stride, at_most(kRowPad, end - h),
                            dz, words, lanes, !g.first);
    }
  }
}

template <typename Format>
void lanes(const HeadGradient& g, int64_t begin, int64_t end) {
  const Head& a = g.head;
  const int64_t words = words_of<Format>(a.rows, swaps(a));
  for (int64_t p = begin; p < end; ++p) {
    pack_panel<Format>(static_cast<typename Format::Word*>(g.hidden_lanes) + p * words * kPanel,
                       a.hidden, false, p * kPanel, at_most(a.depth - p * kPanel, kPanel), a.rows,
                       swaps(a));
  }
}

void store_as(Dtype dtype, void* out, int64_t at, float value) {
  if (dtype == Dtype::kFloat32) {
    store(static_cast<float*>(out) + at, value);
  } else {
    store(static_cast<BFloat16*>(out) + at, value);
  }
}

template <typename Format>
void weight_tiles(const HeadGradient& g, int64_t panel_begin, int64_t panel_end,
                  int64_t block_begin, int64_t block_end, void* scratch) {
  const ProductScope<Format> scope;
  using Word = typename Format::Word;
  const Head& a = g.head;
  float* sums = static_cast<float*>(scratch);
  const int64_t words = words_of<Format>(a.rows, swaps(a));
  const int64_t stride = padded_rows(a) / Format::kPerWord;
  for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
    const Word* packed = static_cast<const Word*>(g.hidden_lanes) + panel * words * kPanel;
    const int64_t h = panel * kPanel, count = at_most(a.depth - h, kPanel);
    for (int64_t block = block_begin; block < block_end; ++block) {
      const Columns columns = columns_of(a, block);
      const int64_t in_chunk = (block - g.block_begin) * kHeadBlock;
      const Word* dz = static_cast<const Word*>(g.chunk_rows) + (in_chunk + columns.begin) * stride;
      panel_product<Format>(sums, dz, stride, columns.end - columns.begin, packed, words,
                            static_cast<int>(count), false);
      for (int64_t v = columns.begin; v < columns.end; ++v) {
        const int64_t out = (block * kHeadBlock + v) * a.depth + h;
        for (int64_t i = 0; i < count; ++i) {
          store_as(a.weight.dtype, g.grad_weight, out + i, sums[(v - columns.begin) * kPanel + i]);
        }
      }
    }
  }
}

}  // namespace

void gradient_logits(const HeadGradient& g, int64_t panel_begin, int64_t panel_end,
                     int64_t block_begin, int64_t block_end, void* scratch) {
  RLIR_WITH_FORMAT(g.head, tiles)
  (g, panel_begin, panel_end, block_begin, block_end, scratch);
}

void gradient_weight_t(const HeadGradient& g, int64_t begin, int64_t end) {
  RLIR_WITH_FORMAT(g.head, weight_t)(g, begin, end);
}

void gradient_hidden(const HeadGradient& g, int64_t panel_begin, int64_t panel_end, int64_t begin,
                     int64_t end, void* scratch) {
  RLIR_WITH_FORMAT(g.head, hidden_tiles)(g, panel_begin, panel_end, begin, end, scratch);
}

void gradient_lanes(const HeadGradient& g, int64_t begin, int64_t end) {
  RLIR_WITH_FORMAT(g.head, lanes)(g, begin, end);
}

void gradient_weight(const HeadGradient& g, int64_t panel_begin, int64_t panel_end,
                     int64_t block_begin, int64_t block_end, void* scratch) {
  RLIR_WITH_FORMAT(g.head, weight_tiles)
  (g, panel_begin, panel_end, block_begin, block_end, scratch);
}

void gradient_bias(const HeadGradient& g, int64_t begin, int64_t end) {
  const int64_t groups = (g.head.rows + kHeadGroup - 1) / kHeadGroup, columns = chunk_columns(g);
  for (int64_t v = begin; v < end; ++v) {
    double lanes[kSoftmaxLanes] = {};
    for (int64_t group = 0; group < groups; ++group) {
      const float* sums = g.bias_sums + (group * columns + v) * kSoftmaxLanes;
      for (int i = 0; i < kSoftmaxLanes; ++i) lanes[i] += static_cast<double>(sums[i]);
    }
    fold_lanes(lanes);
    g.grad_bias[g.block_begin * kHeadBlock + v] = static_cast<float>(lanes[0]);
  }
}

void gradient_rows(const HeadGradient& g, int64_t begin, int64_t end) {
  const Head& a = g.head;
  for (int64_t panel = begin; panel < end; ++panel) {
    const float* sums = g.grad_panels + panel * round_up(a.depth, kRowPad) * kPanel;
    const int64_t first = panel * kPanel;
    for (int64_t lane = 0; lane < at_most(a.rows - first, kPanel); ++lane) {
      for (int64_t h = 0; h < a.depth; ++h) {
        store_as(a.hidden.dtype, g.grad_hidden, (first + lane) * a.depth + h,
                 sums[h * kPanel + lane]);
      }
    }
  }
}

}  // namespace rlir::cpu::RLIR_ISA
