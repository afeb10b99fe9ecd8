// rlir::inverse_reward: schema, checks and CPU dispatch. Formula: cpu/inverse_reward.h.
#include "cpu/inverse_reward.h"

#include <torch/csrc/stable/library.h>

#include <atomic>
#include <cmath>
#include <optional>
#include <string>
#include <tuple>
#include <utility>

#include "core/cpu_isa.h"
#include "ops/action_heads.h"

namespace rlir {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Doubles = std::vector<double>;

void check_like(const char* name, const Tensor& x, ScalarType dtype, int64_t b, int64_t t,
                int64_t last) {
  const std::string what = std::string("inverse_reward: ") + name;
  RLIR_CHECK(x.is_cpu(), what, " must be on the CPU, got another device");
  RLIR_CHECK(x.scalar_type() == dtype, what, " must be of dtype ", static_cast<int>(dtype),
             ", got ", static_cast<int>(x.scalar_type()));
  const bool flat = last < 0;
  const bool fits =
      x.dim() == (flat ? 2 : 3) && x.size(0) == b && x.size(1) == t && (flat || x.size(2) == last);
  if (flat) {
    RLIR_CHECK(fits, what, " must have shape [", b, ", ", t, "], got another shape");
  } else {
    RLIR_CHECK(fits, what, " must have shape [", b, ", ", t, ", ", last, "], got another shape");
  }
}

// Where each factor's commands begin in `classes`; all must be classes of the head.
Ints command_offsets(const HeadTables& tables, const Ints& sizes, const Ints& classes) {
  RLIR_CHECK(static_cast<int64_t>(sizes.size()) == tables.factors(),
             "inverse_reward: command_sizes must be ", tables.factors(), ", got ", sizes.size());
  const auto held = static_cast<int64_t>(classes.size());
  Ints offsets;
  int64_t place = 0;
  for (int64_t f = 0; f < tables.factors(); ++f) {
    RLIR_CHECK(sizes[f] >= 1 && sizes[f] <= held - place,
               "inverse_reward: command_sizes must be >= 1 and sum to ", held, ", got ", sizes[f]);
    offsets.push_back(place);
    for (const int64_t end = place + sizes[f]; place < end; ++place) {
      RLIR_CHECK(classes[place] >= 0 && classes[place] < tables.size(f),
                 "inverse_reward: command_classes must be classes of their head, got ",
                 classes[place]);
    }
  }
  RLIR_CHECK(place == held, "inverse_reward: command_sizes must sum to ", held, ", got ", place);
  return offsets;
}

double sum_of_weights(const HeadTables& tables, const Doubles& weights) {
  RLIR_CHECK(static_cast<int64_t>(weights.size()) == tables.factors(),
             "inverse_reward: weights must be ", tables.factors(), " numbers, got ",
             weights.size());
  double total = 0.0;
  for (const double w : weights) {
    RLIR_CHECK(std::isfinite(w) && w >= 0.0,
               "inverse_reward: weights must be finite and >= 0, got ", w);
    total += w;
  }
  RLIR_CHECK(total > 0.0 && std::isfinite(total),
             "inverse_reward: weights must have a finite sum above 0, got ", total);
  return total;
}

std::tuple<Tensor, Tensor> inverse_reward_cpu(
    const Tensor& button_logits, const Tensor& camera_logits, const Tensor& actions,
    const std::optional<Tensor>& degrees, const std::optional<Tensor>& frame_mask, Ints axis_sizes,
    Ints group_sizes, Ints button_classes, Ints button_opponents, Ints command_sizes,
    Ints command_classes, Doubles edges, Doubles weights, std::string mode) {
  const HeadTables tables("inverse_reward", button_logits, camera_logits, std::move(axis_sizes),
                          std::move(group_sizes), button_classes, button_opponents);
  const int64_t b = button_logits.size(0), t = button_logits.size(1), axes = tables.heads().axes;
  const int64_t factors = tables.factors();
  check_like("actions", actions, ScalarType::Long, b, t, factors);
  if (degrees) check_like("degrees", *degrees, ScalarType::Float, b, t, axes);
  if (frame_mask) check_like("frame_mask", *frame_mask, ScalarType::Bool, b, t, -1);
  const Ints offsets = command_offsets(tables, command_sizes, command_classes);
  const double total = sum_of_weights(tables, weights);
  RLIR_CHECK(mode == "factor" || mode == "joint",
             "inverse_reward: mode must be 'factor' or 'joint', got '", mode, "'");
  size_t wanted = 0;
  for (int64_t f = 0; f < axes; ++f) wanted += static_cast<size_t>((tables.size(f) - 1) / 2);
  RLIR_CHECK(edges.size() == wanted, "inverse_reward: edges must be ", wanted, ", got ",
             edges.size());

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
  args.command_offsets = offsets.data();
  args.command_classes = command_classes.data();
  args.edges = edges.data();
  args.weights = weights.data();
  args.total_weight = total;
  args.joint = mode == "joint";
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
  m.def(
      "inverse_reward(Tensor button_logits, Tensor camera_logits, Tensor actions, "
      "Tensor? degrees=None, Tensor? frame_mask=None, *, int[] axis_sizes, int[] group_sizes, "
      "int[] button_classes, int[] button_opponents, int[] command_sizes, "
      "int[] command_classes, float[] edges, float[] weights, str mode='factor') "
      "-> (Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
}

STABLE_TORCH_LIBRARY_IMPL(rlir, CPU, m) {
  m.impl("inverse_reward", TORCH_BOX(&inverse_reward_cpu));
}

}  // namespace rlir
