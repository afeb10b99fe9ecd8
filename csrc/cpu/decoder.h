// A Llama-style decoder, one position of each row at a time, over a key-value cache whose beginning
// rows share. One build per instruction set; raw pointers only.
//
//   per layer:  h = rms(x, norm_1);  q, k, v = h Wqkv^T;  q, k rotated by the row's position
//               k and v go to the row's own cache
//               x += softmax(q [shared k | own k]^T / sqrt(d)) [shared v | own v]  Wo^T
//               h = rms(x, norm_2);  x += (silu(h Wgate^T) * (h Wup^T)) Wdown^T
//   at the end: logits = rms(x, norm) Whead^T
//
// Formats. x, norms, softmax, logits: float32. In a bfloat16 policy the operands of every product
// (weights, activations, q, k, v, softmax weights) are rounded to bfloat16 and sums stay float32.
//
// Layout. Weights are panels of output features (cpu/product.h), activations rows along k, so that
// the rows of a chunk go through a panel while it is in the cache. Keys of a sequence and head:
// [position / 64][words of d][64], a score is a lane; values [words of position][d padded to 16].
// Both are read in place by the products.
//
// Bits. Each output of a weight's product is the chain of cpu/product.h; a score is one chain over
// d; softmax and values run over blocks of 128 positions in the order of cpu/video_attention.h,
// whose bits they have. The mean of squares goes to accumulator index mod 16 and folds as in
// cpu/softmax.h. None of that depends on other rows, so a row's bits depend on its own past alone,
// whatever the batch, the chunks, the threads and the instruction set (by AMX, bfloat16 has the
// order of cpu/tiles.h and bits of its own). What was never written to a cache is never used, not
// even times zero.
#pragma once

#include <stdint.h>

#include "core/matrix.h"

namespace rlir::cpu {

// D = heads d. Packed weights are those of decoder_pack.
struct Decoder {
  int64_t hidden, layers, heads, kv_heads, head_dim, mlp, codes;
  float eps;
  bool bfloat16;
  const float* norms;   // [layers][2][stride], pads zero
  const float* last;    // [stride]
  const float* rotary;  // [2][positions][d]: cos, sin
  int64_t positions;
  const void *qkv, *out;  // [layers] of [(heads + 2 kv_heads) d][D], [D][D]
  const void* gate_up;    // [layers][2] of [mlp][D]
  const void* down;       // [layers] of [D][mlp]
  const void* head;       // [codes][D]
};

// Keys and values: [layers][sequences][kv_heads] of `capacity` positions.
struct DecoderCache {
  void *k, *v;
  int64_t sequences, capacity;
};

// A row: its position, what it sees of the shared cache (an even number of positions: pairs of
// positions stay together), and what it sees of its own, in which its own key and value come last.
struct DecoderRow {
  int64_t position;
  int64_t shared, shared_count;
  int64_t own, own_count;
};

// In words of 4 bytes.
struct DecoderSizes {
  int64_t panel;            // outputs of a panel
  int64_t values_per_word;  // of the policy's products: 1 or 2
  int64_t keys, values;     // a head of a sequence of `capacity` positions
  int64_t scratch;          // of `rows` rows that see at most `seen` positions
  int64_t stride;           // of a row of x
};

using DecoderSizesOf = DecoderSizes(const Decoder&, int64_t rows, int64_t capacity, int64_t seen);
// One weight [outputs][depth] to [panels][words][panel].
using DecoderPack = void(const Matrix& weight, int64_t outputs, int64_t depth, bool bfloat16,
                         void* packed);
// x [count][stride] in place; pads of x are zero. Scratch is aligned to 64.
using DecoderLayers = void(const Decoder&, const DecoderCache& shared, const DecoderCache& own,
                           const DecoderRow* rows, int64_t count, float* x, void* scratch);
// One position of a sequence, all layers and heads, to a position of a sequence of another cache.
using DecoderCopy = void(const Decoder&, const DecoderCache& from, int64_t sequence,
                         int64_t position, const DecoderCache& to, int64_t to_sequence,
                         int64_t to_position);
// logits [count][codes].
using DecoderLogits = void(const Decoder&, const float* x, int64_t count, float* logits,
                           void* scratch);

#define RLIR_DECODER_BUILD(isa) \
  namespace isa {               \
  DecoderSizesOf decoder_sizes; \
  DecoderPack decoder_pack;     \
  DecoderCopy decoder_copy;     \
  DecoderLayers decoder_layers; \
  DecoderLogits decoder_logits; \
  }
RLIR_DECODER_BUILD(baseline)
RLIR_DECODER_BUILD(avx2)
RLIR_DECODER_BUILD(avx512)
RLIR_DECODER_BUILD(avx512_bf16)
RLIR_DECODER_BUILD(amx)
#undef RLIR_DECODER_BUILD

}  // namespace rlir::cpu
