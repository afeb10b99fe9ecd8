// Forward kernels. Formulas, tiles and bits: selected_logprob.h.
//
// Why one kernel: eager PyTorch writes the logits, reads them for the float32 copy, the maximum,
// the sum, the entropy and the gather, and keeps them for the backward pass. Here a tile of
// logits is reduced while it is in the cache. Rows are lanes of the vectors, so that the sums over
// the vocabulary need no horizontal step.
#include "cpu/selected_logprob.h"

#include "cpu/head.h"
#include "cpu/truncation.h"

namespace rlir::cpu::RLIR_ISA {
namespace {

template <typename Format>
HeadSizes sizes_of(const Head& a) {
  constexpr int64_t kWord = sizeof(typename Format::Word);
  const int64_t words = depth_words<Format>(a), padded = padded_rows(a);
  HeadSizes s;
  s.padded = padded;
  s.panel_rows = kPanel;
  s.panels = padded * words * kWord;
  s.scratch = tile_bytes() + kHeadBlock * words * kWord;
  s.row_logits = kPanel * padded_tokens(a.tokens) * 4 + row_search_bytes(a.tokens);
  s.chunk_panels = s.chunk_rows = padded * kHeadBlock * kWord / Format::kPerWord;
  s.chunk_weight = round_up(a.depth, kRowPad) * kHeadBlock * kWord / Format::kPerWord;
  s.weight_panels = (a.depth + kPanel - 1) / kPanel;
  s.hidden_lanes = s.weight_panels * kPanel * words_of<Format>(a.rows, swaps(a)) * kWord;
  s.grad_panels = padded * round_up(a.depth, kRowPad) * static_cast<int64_t>(sizeof(float));
  return s;
}

template <typename Format>
void pack(const Head& a, int64_t begin, int64_t end) {
  const int64_t words = depth_words<Format>(a);
  for (int64_t p = begin; p < end; ++p) {
    pack_panel<Format>(static_cast<typename Format::Word*>(a.panels) + p * words * kPanel, a.hidden,
                       true, p * kPanel, at_most(a.rows - p * kPanel, kPanel), a.depth, swaps(a));
  }
}

// Sums of a tile of z for kWidth rows; results go to `at` of the block's arrays.
template <bool kEntropy>
void reduce_tile(const Head& a, const Columns& columns, const float* z, int64_t at) {
  Vf maximum = splat(minus_infinity());
  for (int64_t v = columns.begin; v < columns.end; ++v) {
    maximum = max(load_vector(z + v * kPanel), maximum);
  }
  const Vf reference = reference_of(maximum);
  Vf sums[kSoftmaxLanes], dots[kSoftmaxLanes];
  for (int lane = 0; lane < kSoftmaxLanes; ++lane) {
    Vf sum = {}, dot = {};
    for (int64_t v = lane; v < columns.end; v += kSoftmaxLanes) {
      if (v < columns.begin) continue;
      const Vf x = load_vector(z + v * kPanel) - reference, e = exp(x);
      sum += e;
      if (kEntropy) dot = add_dot(e, x, dot);
    }
    sums[lane] = sum;
    dots[lane] = dot;
  }
  fold_lanes(sums);
  fold_lanes(dots);
  store_vector(a.block_max + at, maximum);
  store_vector(a.block_sum + at, sums[0]);
  store_vector(a.block_dot + at, dots[0]);
}

template <typename Format>
void blocks(const Head& a, int64_t panel_begin, int64_t panel_end, int64_t block_begin,
            int64_t block_end, void* scratch) {
  const ProductScope<Format> scope;
  float* z = static_cast<float*>(scratch);
  const int64_t padded = padded_rows(a);
  for (int64_t block = block_begin; block < block_end; ++block) {
    const Columns columns = columns_of(a, block);
    const int64_t start = block * kHeadBlock;
    const auto weight = weight_rows<Format>(a, start + columns.begin, start + columns.end,
                                            static_cast<char*>(scratch) + tile_bytes());
    for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
      logits_tile(a, panel, block, columns, weight, z);
      scale_and_mask(a, panel, block, columns, z);
      const int64_t first = panel * kPanel, lanes = at_most(a.rows - first, kPanel);
      for (int64_t lane = 0; lane < lanes; ++lane) {
        const int64_t v = a.targets[(first + lane) * a.target_stride] - start;
        if (v >= columns.begin && v < columns.end) a.target_z[first + lane] = z[v * kPanel + lane];
      }
      const int64_t at = (block - a.low / kHeadBlock) * padded + first;
      for (int64_t i = 0; i < lanes; i += kWidth) {
        a.with_entropy ? reduce_tile<true>(a, columns, z + i, at + i)
                       : reduce_tile<false>(a, columns, z + i, at + i);
      }
    }
  }
}

template <typename Format>
void logits(const Head& a, float* out, int64_t panel_begin, int64_t panel_end, int64_t block_begin,
            int64_t block_end, void* scratch) {
  const ProductScope<Format> scope;
  float* z = static_cast<float*>(scratch);
  for (int64_t block = block_begin; block < block_end; ++block) {
    const Columns columns = columns_of(a, block);
    const int64_t start = block * kHeadBlock;
    const auto weight = weight_rows<Format>(a, start + columns.begin, start + columns.end,
                                            static_cast<char*>(scratch) + tile_bytes());
    for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
      logits_tile(a, panel, block, columns, weight, z);
      const int64_t first = panel * kPanel;
      for (int64_t lane = 0; lane < at_most(a.rows - first, kPanel); ++lane) {
        float* row = out + (first + lane) * a.tokens + start;
        for (int64_t v = columns.begin; v < columns.end; ++v) row[v] = z[v * kPanel + lane];
      }
    }
  }
}

// The panel's z, row by row, then the search that sample_tokens does.
template <typename Format>
void supports(const Head& a, int64_t top_k, double top_p, uint8_t* mask, int64_t mask_stride,
              int64_t panel_begin, int64_t panel_end, void* scratch, void* row_logits) {
  const ProductScope<Format> scope;
  float* z = static_cast<float*>(scratch);
  float* rows = static_cast<float*>(row_logits);
  const int64_t width = padded_tokens(a.tokens);
  const RowSearch search = row_search(rows + kPanel * width, a.tokens);
  for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
    const int64_t first = panel * kPanel, lanes = at_most(a.rows - first, kPanel);
    for (int64_t i = 0; i < lanes * width; ++i) rows[i] = minus_infinity();
    for (int64_t block = a.low / kHeadBlock; block * kHeadBlock < a.high; ++block) {
      const Columns columns = columns_of(a, block);
      const int64_t start = block * kHeadBlock;
      const auto weight = weight_rows<Format>(a, start + columns.begin, start + columns.end,
                                              static_cast<char*>(scratch) + tile_bytes());
      logits_tile(a, panel, block, columns, weight, z);
      scale_and_mask(a, panel, block, columns, z);
      for (int64_t lane = 0; lane < lanes; ++lane) {
        float* row = rows + lane * width + start;
        for (int64_t v = columns.begin; v < columns.end; ++v) row[v] = z[v * kPanel + lane];
      }
    }
    for (int64_t lane = 0; lane < lanes; ++lane) {
      const float* row = rows + lane * width;
      const float maximum = row_exponentials(search, row, a.low, a.high);
      const Cut cut = row_cut(search, row, maximum, a.low, a.high, {top_k, top_p, 0.0});
      write_support(row, cut, a.low, a.high, a.tokens, mask + (first + lane) * mask_stride);
    }
  }
}

bool in_support(const Head& a, int64_t row, int64_t token) {
  if (token < a.low || token >= a.high) return false;
  if (a.support == nullptr) return true;
  return (a.support[row * a.support_stride + token / 8] >> (token % 8) & 1) != 0;
}

}  // namespace

HeadSizes head_sizes(const Head& a) { return RLIR_WITH_FORMAT(a, sizes_of)(a); }

void head_pack(const Head& a, int64_t begin, int64_t end) {
  RLIR_WITH_FORMAT(a, pack)(a, begin, end);
}

void head_blocks(const Head& a, int64_t panel_begin, int64_t panel_end, int64_t block_begin,
                 int64_t block_end, void* scratch) {
  RLIR_WITH_FORMAT(a, blocks)(a, panel_begin, panel_end, block_begin, block_end, scratch);
}

void head_logits(const Head& a, float* out, int64_t panel_begin, int64_t panel_end,
                 int64_t block_begin, int64_t block_end, void* scratch) {
  RLIR_WITH_FORMAT(a, logits)
  (a, out, panel_begin, panel_end, block_begin, block_end, scratch);
}

void head_support(const Head& a, int64_t top_k, double top_p, uint8_t* mask, int64_t mask_stride,
                  int64_t panel_begin, int64_t panel_end, void* scratch, void* row_logits) {
  RLIR_WITH_FORMAT(a, supports)
  (a, top_k, top_p, mask, mask_stride, panel_begin, panel_end, scratch, row_logits);
}

void head_rows(const Head& a, int64_t panel_begin, int64_t panel_end) {
  const int64_t padded = padded_rows(a), n = a.rows;
  const int64_t count = (a.high - 1) / kHeadBlock - a.low / kHeadBlock + 1;
  for (int64_t row = panel_begin * kPanel; row < at_most(panel_end * kPanel, n); row += kWidth) {
    Vf maximum = splat(minus_infinity());
    for (int64_t b = 0; b < count; ++b) {
      maximum = max(load_vector(a.block_max + b * padded + row), maximum);
    }
    double s[kWidth] = {}, u[kWidth] = {};
    for (int64_t b = 0; b < count; ++b) {
      const int64_t at = b * padded + row;
      const Vf factor = exp(load_vector(a.block_max + at) - maximum);
      for (int i = 0; i < kWidth; ++i) {
        join_block(a.block_max[at + i], maximum[i], factor[i], a.block_sum[at + i],
                   a.block_dot[at + i], s + i, u + i);
      }
    }
    for (int i = 0; i < kWidth && row + i < n; ++i) {
      const int64_t r = row + i;
      const double log_sum = log(s[i]);
      a.stats[r] = maximum[i];
      a.stats[n + r] = static_cast<float>(log_sum);
      a.stats[2 * n + r] = static_cast<float>(1.0 / s[i]);
      a.logprob[r] = row_logprob(a.target_z[r], maximum[i], log_sum);
      if (!in_support(a, r, a.targets[r * a.target_stride])) a.logprob[r] = minus_infinity();
      if (a.with_entropy) a.entropy[r] = row_entropy(s[i], u[i], log_sum);
    }
  }
}

}  // namespace rlir::cpu::RLIR_ISA
