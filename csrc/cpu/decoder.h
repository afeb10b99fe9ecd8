// A Llama-style decoder in steps over key-value caches whose beginning groups of rollouts share.
// One build per instruction set; raw pointers only. csrc/ops/decoder_step.h strings the phases
// together.
//
//   per layer:  h = rms(x, norm_1);  q, k, v = h Wqkv^T;  q, k rotated by the row's position
//               k and v go to the rollout's own cache
//               x += softmax(q [prompt's k | own k]^T / sqrt(d)) [prompt's v | own v]  Wo^T
//               h = rms(x, norm_2);  x += (silu(h Wgate^T) * (h Wup^T)) Wdown^T
//   at the end: logits = rms(x, norm) Whead^T
//
// A row is a token of a rollout; a rollout may have several in a step.
//
// Formats. x, norms, softmax, logits: float32. In a bfloat16 policy the operands of every product
// (weights, activations, q, k, v, softmax weights) are rounded to bfloat16 and sums stay float32.
//
// Caches. Whole blocks of 128 slots of a prompt are rows of d, [slot][d], read once a group: the
// queries of all its rollouts are lanes (cpu/group_decode_attention.h). What is left of the prompt,
// the tail, and a rollout's own slots have key slots as lanes: keys [slot / 64][words of d][64],
// values [words of slots][d padded to 16] (cpu/cache_attention.h). A rollout's own cache begins at
// the block that the prompt ends in and is a ring: slot s is at (s - base) mod capacity.
//
// Weights are panels of output features (cpu/product.h), activations rows along k, so that the rows
// of a step go through a panel while it is in the cache.
//
// Bits. Each output of a weight's product is the chain of cpu/product.h; attention has the order of
// cpu/video_attention.h. The mean of squares goes to accumulator index mod 16 and folds as in
// cpu/softmax.h. None of that depends on other rows, so a row's bits depend on its own past alone,
// whatever the batch, the chunks, the threads and the instruction set (by AMX, bfloat16 has the
// order of cpu/tiles.h and bits of its own). What was never written to a cache is never used, not
// even times zero.
#pragma once

#include <stdint.h>

#include "core/matrix.h"
#include "core/reach.h"

namespace rlir::cpu {

// What the int8 values of an output are multiplied by, [layers][outputs padded to panels] each;
// null where weights are of the policy's dtype. Values stand as the words they become would, one
// byte a value; the head is never int8. Operands are the values themselves, which bfloat16 has
// exactly.
struct DecoderScales {
  const float *qkv, *out, *gate_up, *down;
};

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
  DecoderScales scales;
};

// Keys and values with slots as lanes: [layers][sequences][kv_heads] of `capacity` slots, which is
// a multiple of 128.
struct DecoderCache {
  void *k, *v;
  int64_t sequences, capacity;
};

// The same as rows: [layers][sequences][kv_heads][capacity][d], float or bfloat16.
struct DecoderRows {
  void *k, *v;
  int64_t sequences, capacity;
};

struct DecoderRow {
  int64_t position;  // of the rotary embedding
  int64_t sequence;  // of the own cache
  int64_t index;     // where its key and value go in it
};

// A rollout in a step: rows first .. first + count - 1. Its own cache begins at slot `base`, a
// multiple of 128, of which the first `tail` slots, an even number, are the prompt's tail.
struct DecoderMember {
  int64_t first, count;
  int64_t prompt, sequence;  // of the caches of tails, and of the own one
  int64_t base, tail;
  const Reach* reach;    // [count]
  const uint64_t* seen;  // [count][words] (core/seen_bits.h), from `base` on, whole blocks
  int64_t words;
  int64_t next;  // the own sequence that is read after this one
};

// In words of 4 bytes, but for `panel` and `values_per_word`.
struct DecoderSizes {
  int64_t panel;            // outputs of a panel
  int64_t values_per_word;  // of the policy's products: 1 or 2
  int64_t keys, values;     // a head of a sequence of `capacity` slots
  int64_t x, h, a;          // a row of x, of activations, of the MLP
  int64_t qkv, q;           // a row of q, k and v, and of the rotated queries
  int64_t state;            // of a query of a row: cpu/group_decode_attention.h
  int64_t row_pad;          // activations are padded to a multiple of so many rows
  int64_t product, attend;  // scratch of a task: a product of `rows` rows; attention
};

enum class DecoderProduct : int { kQkv, kOut, kMlp, kDown, kHead };

using DecoderSizesOf = DecoderSizes(const Decoder&, int64_t rows, int64_t capacity);
// One weight [outputs][depth] to [panels][words][panel].
using DecoderPack = void(const Matrix& weight, int64_t outputs, int64_t depth, bool bfloat16,
                         void* packed);
// h [rows begin .. end) = rms(x, weight).
using DecoderNorm = void(const Decoder&, const float* weight, const float* x, int64_t begin,
                         int64_t end, void* h);
// Panels [begin, end) of a weight's outputs for `count` rows of activations:
//   kQkv   to = h Wqkv^T     kOut, kDown   to += h W^T, x
//   kMlp   to = the gated MLP's activations   kHead   to = logits [count][codes]
// `next` is what the thread reads after them, and asked for while the last panel is worked on, as
// each is during the one before. Null: what follows in memory.
using DecoderMultiply = void(const Decoder&, DecoderProduct, int64_t layer, const void* h,
                             int64_t count, int64_t begin, int64_t end, const void* next, void* to,
                             void* scratch);
// Where the weights of a panel of outputs begin; null where they are int8.
using DecoderPanel = const void*(const Decoder&, DecoderProduct, int64_t layer, int64_t panel);
// Rows [begin, end) of qkv: queries rotated to q and, unless null, to raw [rows][heads][d] in the
// policy's dtype; keys, rotated, and values to the own cache.
using DecoderAppend = void(const Decoder&, int64_t layer, const DecoderCache& own,
                           const DecoderRow* rows, const float* qkv, int64_t begin, int64_t end,
                           void* q, void* raw, void* scratch);
// The same for a prompt: raw queries, and keys and values to rows `slots` of a sequence.
using DecoderAppendRows = void(const Decoder&, int64_t layer, const DecoderRows& cache,
                               int64_t sequence, const int64_t* positions, const int64_t* slots,
                               const float* qkv, int64_t begin, int64_t end, void* raw,
                               void* scratch);
// Slot `slot` of a sequence to index `to_index` of another's cache, all layers and heads.
using DecoderPlace = void(const Decoder&, const DecoderRows& from, int64_t sequence, int64_t slot,
                          const DecoderCache& to, int64_t to_sequence, int64_t to_index);
// Values of `count` slots from `slot` on, in a ring, become zeros, in all layers and heads.
using DecoderClear = void(const Decoder&, const DecoderCache& own, int64_t sequence, int64_t index,
                          int64_t count);
// Attention of a rollout's rows for key head `head`, over tail and own slots, on from `state`
// (whole blocks of the prompt; null where there are none): merged [rows][D].
using DecoderAttend = void(const Decoder&, int64_t layer, const DecoderCache& tails,
                           const DecoderCache& own, const DecoderMember&, int64_t head,
                           const void* q, const float* state, float* merged, void* scratch);
// Rows [begin, end) of floats, or of raw rows [D], as activations.
using DecoderRound = void(const Decoder&, const float* merged, int64_t begin, int64_t end, void* h);
using DecoderWords = void(const Decoder&, const void* raw, int64_t begin, int64_t end, void* h,
                          void* scratch);

#define RLIR_DECODER_BUILD(isa)          \
  namespace isa {                        \
  DecoderSizesOf decoder_sizes;          \
  DecoderPack decoder_pack;              \
  DecoderNorm decoder_norm;              \
  DecoderMultiply decoder_multiply;      \
  DecoderPanel decoder_panel;            \
  DecoderAppend decoder_append;          \
  DecoderAppendRows decoder_append_rows; \
  DecoderPlace decoder_place;            \
  DecoderClear decoder_clear;            \
  DecoderAttend decoder_attend;          \
  DecoderRound decoder_round;            \
  DecoderWords decoder_words;            \
  }
RLIR_DECODER_BUILD(baseline)
RLIR_DECODER_BUILD(avx2)
RLIR_DECODER_BUILD(avx512)
RLIR_DECODER_BUILD(avx512_bf16)
RLIR_DECODER_BUILD(amx)
#undef RLIR_DECODER_BUILD

}  // namespace rlir::cpu
