// Log-probability of one token a row and the entropy of the row, on a GPU, without the logits of
// the batch in memory. Formulas: cpu/selected_logprob.h; the order of sums over the vocabulary:
// cpu/softmax.h. Raw pointers and a stream; nothing here waits for the device.
#pragma once

#include <stdint.h>

#include "core/dtype.h"
#include "core/matrix.h"

namespace rlir::cuda {

struct Head {
  Matrix hidden, weight;  // [N][H], [V][H]; float32 or bfloat16
  // Tensor cores take both operands: bfloat16, contiguous along H, and aligned to 16 bytes, as are
  // the rows (head_packed).
  bool tensor_cores;
  const void* bias;  // [V], or null
  Dtype bias_dtype;
  int64_t bias_stride;
  int64_t rows, depth, tokens;
  int64_t low, high;  // vocab_range
  float temperature;
  const uint8_t* support;  // bit v % 8 of byte v / 8, rows support_stride bytes apart; or null
  int64_t support_stride;
  const int64_t* targets;
  int64_t target_stride;
};

struct SelectedLogprob {
  Head head;
  float *block_max, *block_sum, *block_dot;  // scratch [blocks of 256 columns][N]
  float* target_z;                           // scratch [N]
  float *logprob, *entropy;                  // [N]; entropy may be null
  float* stats;                              // [3][N]: maximum m of z, log s, 1 / s
};

struct HeadGradient {
  Head head;
  const float *stats, *entropy;              // of the forward pass
  const float *grad_logprob, *grad_entropy;  // [N] with strides, or null
  int64_t grad_logprob_stride, grad_entropy_stride;
  int64_t block_begin, block_end;  // a chunk of the vocabulary, blocks of 256 columns
  // Scratch: dz of the chunk, [N][256 blocks] in bfloat16 for tensor cores or float32; what
  // dhidden is so far, [N][H], or null if there is one chunk; sums of dz over tiles of rows.
  void* dz;
  float* hidden_sums;
  float* bias_sums;                 // [head_row_tiles()][columns of the chunk], or null
  bool first, last;                 // of the chunks
  void *grad_hidden, *grad_weight;  // contiguous, in the operands' formats, or null
  Dtype hidden_dtype, weight_dtype;
  float* grad_bias;  // [V], or null
};

// Whether a matrix can go to tensor cores as it lies.
bool head_packed(const Matrix& x);
// Rows of bfloat16 elements, `stride` (a multiple of 8) apart and padded with zeros.
int head_pack(const Matrix& from, int64_t rows, int64_t depth, void* to, int64_t stride,
              void* stream);
int64_t head_row_tiles(const Head& head);

// Return an error code of launch(). At least one row. A target outside of [0, V), or a row of
// `support` without a token of vocab_range, gives NaN, and a device assertion fails.
int selected_logprob(const SelectedLogprob& args, void* stream);
// logits [N][V] float32, contiguous: vocab_range of them, at temperature 1.
int head_logits(const Head& head, float* logits, void* stream);
// One chunk; in order.
int selected_logprob_backward(const HeadGradient& args, void* stream);

}  // namespace rlir::cuda
