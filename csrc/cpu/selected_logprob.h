// Log-probability of one token a row and the entropy of the row, from hidden states and the head's
// weight, without the logits of the batch in memory. One build per instruction set; raw pointers.
//
//   logit[n][v] = sum_h hidden[n][h] weight[v][h] + bias[v]        z = logit / temperature
//   logprob[n]  = z[n][t_n] - log sum_v exp z[n][v]                v in the support of row n
//   entropy[n]  = -sum_v p[n][v] log p[n][v]                       p = softmax of z on the support
//
// The support is vocab_range [low, high), and where a bit mask is given its bits as well. It is
// constant. A target outside has logprob -infinity and no gradient.
//
//   dz[n][v] = dlogprob_n ((v = t_n) - p) - dentropy_n p (log p + entropy_n)
//   dhidden  = dz weight / T      dweight = dz^T hidden / T      dbias = sum_n dz / T
//
// Tiles. Rows of `hidden` are packed in panels (cpu/product.h), the vocabulary goes by in blocks of
// 256 columns; a tile of 256 columns by one panel of rows is all that exists of the logits. The
// backward pass computes them again and keeps dz of one chunk of the vocabulary for all rows, in
// two layouts, one for each of the products that follow.
//
// Bits. A row's results depend on that row and the head alone; sums over rows (dweight, dbias) run
// in the order of the rows, whatever the threads. float32, and bfloat16 without subnormals: the
// same bits from every build, but for two bfloat16 operands in the amx build (cpu/tiles.h).
#pragma once

#include <stdint.h>

#include "core/matrix.h"

namespace rlir::cpu {

// Rows whose tiles one task works on in a row; also the unit in which dbias is summed. A whole
// number of panels in every build.
inline constexpr int64_t kHeadGroup = 384;
inline constexpr int64_t kHeadBlock = 256;  // columns: kSoftmaxBlock
inline constexpr int64_t kHeadStep = 96;    // of h, in gradient_hidden: whole tiles in every build

// float32 or bfloat16 operands. Sizes: rows N, depth H, tokens V.
struct Head {
  Matrix hidden, weight;  // [N][H], [V][H]
  const float* bias;      // [V], or null
  int64_t rows, depth, tokens;
  int64_t low, high;  // vocab_range
  float temperature;
  const uint8_t* support;  // bit v % 8 of byte v / 8, rows support_stride bytes apart; or null
  int64_t support_stride;
  const int64_t* targets;
  int64_t target_stride;
  bool with_entropy;
  // Work space. Rows are padded to whole panels, `padded` of them.
  void* panels;                              // hidden, packed
  float *block_max, *block_sum, *block_dot;  // [blocks][padded]
  float* target_z;                           // [padded]
  // Results.
  float *logprob, *entropy;  // [N]
  float* stats;              // [3][N]: maximum m of z, log s, 1 / s
};

// What a build wants as work space, in bytes, given the operands and sizes of a Head.
struct HeadSizes {
  int64_t padded;         // rows in whole panels
  int64_t panel_rows;     // rows of a panel
  int64_t panels;         // Head::panels
  int64_t scratch;        // of a task, forward or backward
  int64_t row_logits;     // of a task of head_support: logits of a panel and what it searches in
  int64_t chunk_panels;   // HeadGradient, a chunk of kHeadBlock columns each:
  int64_t chunk_rows;     //   the two layouts of dz
  int64_t chunk_weight;   //   the weight transposed
  int64_t hidden_lanes;   // HeadGradient::hidden_lanes
  int64_t grad_panels;    // HeadGradient::grad_panels
  int64_t weight_panels;  // how many panels grad_weight has along H
};
using HeadSizesOf = HeadSizes(const Head&);

using HeadPanels = void(const Head&, int64_t panel_begin, int64_t panel_end);
using HeadTiles = void(const Head&, int64_t panel_begin, int64_t panel_end, int64_t block_begin,
                       int64_t block_end, void* scratch);
// logits [N][V] float32, contiguous.
using HeadLogits = void(const Head&, float* logits, int64_t panel_begin, int64_t panel_end,
                        int64_t block_begin, int64_t block_end, void* scratch);
// mask [N][mask_stride] bytes: the support that top_k and top_p leave (cpu/truncation.h).
using HeadSupport = void(const Head&, int64_t top_k, double top_p, uint8_t* mask,
                         int64_t mask_stride, int64_t panel_begin, int64_t panel_end, void* scratch,
                         void* row_logits);

struct HeadGradient {
  Head head;                                 // stats and entropy are read; no target_z, block_*
  const float *grad_logprob, *grad_entropy;  // [N] with strides, or null
  int64_t grad_logprob_stride, grad_entropy_stride;
  int64_t block_begin, block_end;  // the chunk
  bool first;                      // nothing is in grad_panels yet
  void *chunk_panels, *chunk_rows, *chunk_weight, *hidden_lanes;
  float* grad_panels;
  float* bias_sums;                 // [groups][columns of the chunk][16], or null
  void *grad_hidden, *grad_weight;  // contiguous, in the operands' formats
  float* grad_bias;                 // [V]
};
using HeadGradientRange = void(const HeadGradient&, int64_t begin, int64_t end);
using HeadGradientTiles = void(const HeadGradient&, int64_t panel_begin, int64_t panel_end,
                               int64_t block_begin, int64_t block_end, void* scratch);

// head_pack           panels of hidden
// head_blocks         softmax sums of tiles
// head_rows           results of rows, by panels, from the sums of all blocks
// head_logits         the logits themselves, for a rollout
// head_support        supports of rows, by panels
// gradient_lanes      hidden_lanes, by panels along H
// gradient_weight_t   chunk_weight, by rows h
// gradient_logits     dz of tiles
// gradient_hidden     adds the chunk to grad_panels, by panels of rows and a range of h (in place
//                     of blocks) that begins at a multiple of kHeadStep
// gradient_weight     grad_weight: panels along H by blocks of the chunk
// gradient_bias       grad_bias, by columns of the chunk
// gradient_rows       grad_hidden from grad_panels, by panels
#define RLIR_SELECTED_LOGPROB_BUILD(isa)                                             \
  namespace isa {                                                                    \
  HeadSizesOf head_sizes;                                                            \
  HeadPanels head_pack, head_rows;                                                   \
  HeadTiles head_blocks;                                                             \
  HeadLogits head_logits;                                                            \
  HeadSupport head_support;                                                          \
  HeadGradientRange gradient_lanes, gradient_weight_t, gradient_bias, gradient_rows; \
  HeadGradientTiles gradient_logits, gradient_hidden, gradient_weight;               \
  }
RLIR_SELECTED_LOGPROB_BUILD(baseline)
RLIR_SELECTED_LOGPROB_BUILD(avx2)
RLIR_SELECTED_LOGPROB_BUILD(avx512)
RLIR_SELECTED_LOGPROB_BUILD(avx512_bf16)
RLIR_SELECTED_LOGPROB_BUILD(amx)
#undef RLIR_SELECTED_LOGPROB_BUILD

}  // namespace rlir::cpu
