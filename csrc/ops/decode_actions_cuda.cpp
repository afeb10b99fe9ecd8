// rlir::decode_actions on CUDA. Nothing here waits for the device, and all memory comes from
// torch's allocator: a call can be captured in a CUDA graph.
#include "cuda/decode_actions.cuh"

#include <tuple>
#include <utility>

#include "ops/action_heads_cuda.h"
#include "ops/decode_actions.h"

namespace rlir {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

std::tuple<Tensor, Tensor> decode_actions_cuda(const Tensor& button_logits,
                                               const Tensor& camera_logits, Ints axis_sizes,
                                               Ints group_sizes, Ints button_classes,
                                               Ints button_opponents, std::vector<double> centres) {
  const HeadTables tables("decode_actions", button_logits, camera_logits, std::move(axis_sizes),
                          std::move(group_sizes), button_classes, button_opponents);
  check_centres(tables, centres);
  CudaCall call("decode_actions", button_logits);
  const int64_t b = button_logits.size(0), t = button_logits.size(1);
  Tensor classes =
      torch::stable::new_empty(button_logits, {b, t, tables.factors()}, ScalarType::Long);
  Tensor degrees =
      torch::stable::new_empty(button_logits, {b, t, tables.heads().axes}, ScalarType::Float);
  cuda::DecodeActions args{};
  fill_heads("decode_actions", tables, call, button_logits, camera_logits, &args.heads);
  if (b * t == 0) return {classes, degrees};
  for (size_t i = 0; i < centres.size(); ++i) args.centres[i] = static_cast<float>(centres[i]);
  args.rows = b * t;
  args.frames = t;
  args.classes = static_cast<int64_t*>(call.out(classes, "classes"));
  args.degrees = static_cast<float*>(call.out(degrees, "degrees"));
  call.check(cuda::decode_actions(args, call.stream()));
  return {classes, degrees};
}

}  // namespace

RLIR_CUDA_OP("decode_actions", kDecodeActionsSchema, &decode_actions_cuda)

}  // namespace rlir
