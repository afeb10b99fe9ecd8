// No kernels of its own: those of video_attention take keys in two parts, of which a group shares
// the first, and sum the gradients of keys over the queries of two calls. So the prefix is computed
// once, and the gradients of its keys need no memory between its own queries and the suffixes'.
#include "cuda/group_attention.cuh"

namespace rlir::cuda {

int group_attention(const GroupForward& args, void* stream) {
  const int error = args.has_prefix ? video_attention(args.prefix, stream) : 0;
  if (error != 0 || !args.has_suffix) return error;
  return video_attention(args.suffix, stream);
}

int group_attention_backward(const GroupBackward& args, void* stream) {
  int error = 0;
  if (args.has_prefix) error = attention_gradient_rows(args.prefix, stream);
  if (error == 0 && args.has_suffix) error = attention_gradient_rows(args.suffix, stream);
  if (error == 0 && args.has_prefix) error = attention_gradient_queries(args.prefix, stream);
  if (error == 0 && args.has_suffix) error = attention_gradient_queries(args.suffix, stream);
  if (error == 0 && args.has_suffix && args.suffix.in.part[1].slots > 0) {
    error = attention_gradient_keys(args.suffix, nullptr, 1, stream);
  }
  const AttentionBackward& first = args.has_suffix ? args.suffix : args.prefix;
  if (error != 0 || first.in.part[0].slots == 0) return error;
  const bool both = args.has_suffix && args.has_prefix;
  return attention_gradient_keys(first, both ? &args.prefix : nullptr, 0, stream);
}

}  // namespace rlir::cuda
