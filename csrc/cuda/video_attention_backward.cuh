// Gradients of attention on a GPU. Formulas: cpu/video_attention.h. Raw pointers and a stream;
// nothing here waits for the device.
#pragma once

#include "cuda/video_attention.cuh"

namespace rlir::cuda {

// Scratch: the queries that share the keys of a part, in tiles of 64 rows; the last one is padded.
struct GradientRows {
  float *lse, *delta;  // [batches][kv_heads][tiles 64]; lse in base 2
  void* sights;        // [batches][tiles 64] of 16 bytes: what each row sees
  void* spans;         // [batches][tiles] of 16 bytes: what a tile's rows see
};

struct AttentionBackward {
  Attention in;
  Heads grad_out, out;    // [N][T][H][D]
  const float* lse;       // [N][T][H]
  const float* grad_lse;  // with strides; or null
  int64_t grad_lse_sequence, grad_lse_token, grad_lse_head;
  GradientRows rows[2];  // of each part
  void* dq;              // [N][T][H][D], contiguous, as are the next
  void *dk[2], *dv[2];   // [batches][slots][Hkv][D] of each part
};

// Tiles of 64 rows of the queries that share the keys of a part.
int64_t gradient_tiles(const Attention& in, int part);

// Return an error code of launch(). The rows come first. At least one query; for the gradients of
// keys, which are sums over the queries of up to two calls with the same keys in the same part (the
// second may be null), at least one slot.
int attention_gradient_rows(const AttentionBackward& args, void* stream);
int attention_gradient_queries(const AttentionBackward& args, void* stream);
int attention_gradient_keys(const AttentionBackward& args, const AttentionBackward* second,
                            int part, void* stream);

}  // namespace rlir::cuda
