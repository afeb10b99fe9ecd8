// Attention over the tokens of a video on a GPU: forward and backward. Formulas:
// cpu/video_attention.h; what a query sees: core/reach.h. Raw pointers and a stream; nothing here
// waits for the device.
#pragma once

#include <stdint.h>

#include "core/dtype.h"
#include "core/reach.h"

namespace rlir::cuda {

// [batch][tokens][heads][D], contiguous along D; strides in elements. On tensor cores the pointer
// is aligned to 16 bytes, and so are the strides.
struct Heads {
  const void* data;
  int64_t batch;
  int token, head;
};

// Keys and values of one part of a sequence.
struct KeyPart {
  Heads k, v;
  int64_t slots;           // in memory
  const int64_t* lengths;  // how many of them are there, of each batch; null: all
  int64_t length_stride;
};

// N sequences of queries. The keys of a sequence are those of part 0, which `group` neighbouring
// sequences share, and after them those of part 1, if there is one.
struct Attention {
  Dtype dtype;  // float32, or bfloat16 for tensor cores
  Heads q;
  KeyPart part[2];
  int parts;
  int64_t sequences, group, tokens, heads, kv_heads, depth;
  const int64_t* positions;  // of queries; null: they are the last of their sequence
  int64_t position_batch, position_token;
  const int64_t* q_lengths;  // null: all tokens
  int64_t q_length_stride;
  AttentionMask mask;
  double scale;  // above 0
};

struct AttentionForward {
  Attention in;
  void* out;   // [N][T][H][D], contiguous
  float* lse;  // [N][T][H]; or null
};

// Return an error code of launch(). At least one query; `depth` is 32, 64 or 128.
int video_attention(const AttentionForward& args, void* stream);

}  // namespace rlir::cuda
