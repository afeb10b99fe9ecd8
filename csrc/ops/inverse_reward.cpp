// rlir::inverse_reward on the CPU. Formula: cpu/inverse_reward.h.
#include "cpu/inverse_reward.h"

#include <torch/csrc/stable/library.h>

#include <atomic>
#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <utility>

#include "core/cpu_isa.h"
#include "ops/inverse_reward.h"

namespace rlir {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Doubles = std::vector<double>;

std::tuple<Tensor, Tensor> inverse_reward_cpu(
    const Tensor& button_logits, const Tensor& camera_logits, const Tensor& actions,
    const std::optional<Tensor>& degrees, const std::optional<Tensor>& frame_mask, Ints axis_sizes,
    Ints group_sizes, Ints button_classes, Ints button_opponents, Ints command_sizes,
    Ints command_classes, Doubles edges, Doubles weights, std::string mode) {
  const HeadTables tables("inverse_reward", button_logits, camera_logits, std::move(axis_sizes),
                          std::move(group_sizes), button_classes, button_opponents);
  const int64_t b = button_logits.size(0), t = button_logits.size(1), axes = tables.heads().axes;
  const int64_t factors = tables.factors();
  const RewardOptions checked =
      check_inverse_reward(tables, button_logits, actions, degrees, frame_mask, command_sizes,
                           command_classes, edges, weights, mode);

  Tensor reward = torch::stable::new_empty(button_logits, {b}, ScalarType::Float);
  Tensor matches = torch::stable::new_empty(button_logits, {b, t, factors}, ScalarType::Float);
  if (b == 0) return {reward, matches};
  cpu::InverseReward args{};
  args.heads = tables.heads();
  args.frames = t;
  args.actions = actions.const_data_ptr<int64_t>();
  for (int i = 0; i < 3; ++i) args.action_strides[i] = actions.stride(i);
  if (degrees) {
    args.degrees = degrees->const_data_ptr<float>();
    for (int i = 0; i < 3; ++i) args.degree_strides[i] = degrees->stride(i);
  }
  if (frame_mask) {
    args.mask = frame_mask->const_data_ptr<bool>();
    for (int i = 0; i < 2; ++i) args.mask_strides[i] = frame_mask->stride(i);
  }
  args.command_sizes = command_sizes.data();
  args.command_offsets = checked.offsets.data();
  args.command_classes = command_classes.data();
  args.edges = edges.data();
  args.weights = weights.data();
  args.total_weight = checked.total_weight;
  args.joint = checked.joint;
  args.reward = reward.mutable_data_ptr<float>();
  args.matches = matches.mutable_data_ptr<float>();

  const auto kernel = RLIR_CPU_KERNEL(inverse_reward);
  std::atomic<int64_t> first_bad{std::numeric_limits<int64_t>::max()};
  torch::stable::parallel_for(0, b, action_grain(tables, t), [&](int64_t begin, int64_t end) {
    const int64_t bad = kernel(args, begin, end, ActionBuffers(tables).scratch);
    int64_t first = first_bad.load();
    while (bad >= 0 && bad < first && !first_bad.compare_exchange_weak(first, bad)) {
    }
  });
  const int64_t bad = first_bad.load();
  if (bad != std::numeric_limits<int64_t>::max()) {
    const int64_t f = bad % factors, frame = bad / factors % t, trajectory = bad / factors / t;
    RLIR_CHECK(!degrees || f >= axes, "inverse_reward: degrees must not be NaN, got NaN in frame ",
               frame, " of trajectory ", trajectory);
    const int64_t value = args.actions[trajectory * args.action_strides[0] +
                                       frame * args.action_strides[1] + f * args.action_strides[2]];
    fail("inverse_reward: actions of factor ", f, " must be from 0 and below ", command_sizes[f],
         ", got ", value);
  }
  return {reward, matches};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(rlir, m) {
  m.def(kInverseRewardSchema, {at::Tag::pt2_compliant_tag});
}

STABLE_TORCH_LIBRARY_IMPL(rlir, CPU, m) {
  m.impl("inverse_reward", TORCH_BOX(&inverse_reward_cpu));
}

}  // namespace rlir
