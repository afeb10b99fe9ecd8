// Attention of a prefix and of suffixes that continue it, forward and backward, on a GPU. Formula:
// cpu/video_attention.h. Raw pointers and a stream; nothing here waits for the device.
#pragma once

#include "cuda/video_attention_backward.cuh"

namespace rlir::cuda {

// The prefix's call has one part of keys, the suffixes' two, of which the first is the prefix's.
struct GroupForward {
  bool has_prefix, has_suffix;  // whether there are queries
  AttentionForward prefix, suffix;
};
struct GroupBackward {
  bool has_prefix, has_suffix;  // whether there are gradients
  AttentionBackward prefix, suffix;
};

// Return an error code of launch(). Gradients of what has none are not written, but for those of
// the prefix's keys: the sum over all queries that see them.
int group_attention(const GroupForward& args, void* stream);
int group_attention_backward(const GroupBackward& args, void* stream);

}  // namespace rlir::cuda
