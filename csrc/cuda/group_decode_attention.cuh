// Decoding attention of rollouts that share a prompt, on a GPU. Formula: cpu/video_attention.h,
// over the group's prefix (part 0 of the keys) and the rollout's suffix (part 1). Raw pointers and
// a stream; nothing here waits for the device.
#pragma once

#include "cuda/video_attention.cuh"

namespace rlir::cuda {

struct GroupDecode {
  Attention in;  // bfloat16, two parts
  void* out;     // [N][T][H][D], contiguous
  // Scratch: of each chunk, what a query has of it.
  float* sums;    // [chunks][N][T][H][D]
  float* scales;  // [chunks][N][T][H][2]: m in base 2, l
};

// How many chunks the slots of both parts make.
int64_t group_decode_chunks(const Attention& in);

// Returns an error code of launch(). At least one query.
int group_decode_attention(const GroupDecode& args, void* stream);

}  // namespace rlir::cuda
