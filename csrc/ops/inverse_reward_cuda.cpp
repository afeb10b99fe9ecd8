// rlir::inverse_reward on CUDA. Nothing here waits for the device, and all memory comes from
// torch's allocator: a call can be captured in a CUDA graph.
#include "cuda/inverse_reward.cuh"

#include <algorithm>
#include <tuple>
#include <utility>

#include "ops/action_heads_cuda.h"
#include "ops/inverse_reward.h"

namespace rlir {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

std::tuple<Tensor, Tensor> inverse_reward_cuda(
    const Tensor& button_logits, const Tensor& camera_logits, const Tensor& actions,
    const std::optional<Tensor>& degrees, const std::optional<Tensor>& frame_mask, Ints axis_sizes,
    Ints group_sizes, Ints button_classes, Ints button_opponents, Ints command_sizes,
    Ints command_classes, std::vector<double> edges, std::vector<double> weights,
    std::string mode) {
  const HeadTables tables("inverse_reward", button_logits, camera_logits, std::move(axis_sizes),
                          std::move(group_sizes), button_classes, button_opponents);
  const RewardOptions checked =
      check_inverse_reward(tables, button_logits, actions, degrees, frame_mask, command_sizes,
                           command_classes, edges, weights, mode);
  RLIR_CHECK(command_classes.size() <= static_cast<size_t>(cuda::kMaxCommands),
             "inverse_reward: command_classes must be at most ", cuda::kMaxCommands,
             " on CUDA, got ", command_classes.size());
  CudaCall call("inverse_reward", button_logits);
  const int64_t b = button_logits.size(0), t = button_logits.size(1), factors = tables.factors();
  Tensor reward = torch::stable::new_empty(button_logits, {b}, ScalarType::Float);
  Tensor matches = torch::stable::new_empty(button_logits, {b, t, factors}, ScalarType::Float);
  cuda::InverseReward args{};
  fill_heads("inverse_reward", tables, call, button_logits, camera_logits, &args.heads);
  if (b == 0) return {reward, matches};
  args.trajectories = b;
  args.frames = t;
  args.actions = static_cast<const int64_t*>(call.in(actions, "actions"));
  for (int i = 0; i < 3; ++i) args.action_strides[i] = actions.stride(i);
  if (degrees) {
    args.degrees = static_cast<const float*>(call.in(*degrees, "degrees"));
    for (int i = 0; i < 3; ++i) args.degree_strides[i] = degrees->stride(i);
  }
  if (frame_mask) {
    args.mask = static_cast<const bool*>(call.in(*frame_mask, "frame_mask"));
    for (int i = 0; i < 2; ++i) args.mask_strides[i] = frame_mask->stride(i);
  }
  int64_t edge = 0;
  for (int64_t f = 0; f < factors; ++f) {
    args.command_sizes[f] = static_cast<int32_t>(command_sizes[f]);
    args.command_offsets[f] = static_cast<int32_t>(checked.offsets[f]);
    args.edge_offsets[f] = static_cast<int32_t>(edge);
    args.weights[f] = weights[f];
    if (f < tables.heads().axes) edge += (tables.size(f) - 1) / 2;
  }
  std::copy(command_classes.begin(), command_classes.end(), args.command_classes);
  std::copy(edges.begin(), edges.end(), args.edges);
  args.total_weight = checked.total_weight;
  args.joint = checked.joint;
  args.reward = static_cast<float*>(call.out(reward, "reward"));
  args.matches = static_cast<float*>(call.out(matches, "matches"));
  call.check(cuda::inverse_reward(args, call.stream()));
  return {reward, matches};
}

}  // namespace

RLIR_CUDA_OP("inverse_reward", kInverseRewardSchema, &inverse_reward_cuda)

}  // namespace rlir
