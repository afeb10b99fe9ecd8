// The local-dynamics stem of rlir/models/world_model.py for whole rollouts, on the products of
// cpu/product.h, so that its bits depend on a rollout alone. (torch's convolutions give other bits
// in other batches.) One build per instruction set; raw pointers only.
//
//   f_0 .. f_n  scale and shift of each convolution: sums over the action's tokens of their rows
//   x    = gelu(conv_in(embed(previous)) (1 + scale_0) + shift_0)
//   x   += gelu(conv_i(x) (1 + scale_i) + shift_i)            i = 1 .. n
//   out  = x W^T + b                                           a row a visual token
//
// Formats are those of cpu/decoder.h: operands of products in the policy's dtype, the rest float32.
// gelu is x Phi(x) with erf by Abramowitz and Stegun 7.1.26, which is off by at most 1.5e-7.
//
// Layout. An image stands as words [row][column][channels padded to 16] within a border of zeros,
// so that what a row of a kernel sees is contiguous: a convolution is three products, one a row of
// the kernel, added up in order. A kernel's row dy is a weight [channels][columns of the kernel x
// channels], packed by decoder_pack.
#pragma once

#include <stdint.h>

namespace rlir::cpu {

struct Stem {
  int64_t rows, columns, embedding, channels, blocks, hidden, action;
  int64_t input_width, block_width;  // columns of the kernels; they have three rows
  bool bfloat16;
  const float* codes;        // [V][embedding padded]
  const float* film;         // [vocabulary][blocks + 1][2][channels padded]
  const void* input;         // [3] of [channels][input_width x embedding padded]
  const float* input_bias;   // [channels padded]
  const void* block;         // [blocks][3] of [channels][block_width x channels padded]
  const float* block_bias;   // [blocks][channels padded]
  const void* output;        // [hidden][channels padded]
  const float* output_bias;  // [hidden padded]
};

using StemScratch = int64_t(const Stem&);  // bytes, aligned to 64
// One rollout: out [rows columns][hidden] of previous [rows columns] and tokens [action]. What a
// backward pass needs goes to saved [blocks + 1][2][rows columns][channels padded], or nowhere if
// null: each convolution with its bias, and the x that it leads to.
using StemRollout = void(const Stem&, const int64_t* previous, const int64_t* tokens, float* out,
                         float* saved, void* scratch);

#define RLIR_STEM_BUILD(isa) \
  namespace isa {            \
  StemScratch stem_scratch;  \
  StemRollout stem_rollout;  \
  }
RLIR_STEM_BUILD(baseline)
RLIR_STEM_BUILD(avx2)
RLIR_STEM_BUILD(avx512)
RLIR_STEM_BUILD(avx512_bf16)
#undef RLIR_STEM_BUILD

}  // namespace rlir::cpu
