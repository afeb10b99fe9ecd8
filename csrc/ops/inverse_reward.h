// rlir::inverse_reward: schema and checks, for every device. Formula: cpu/inverse_reward.h.
#pragma once

#include <cmath>
#include <optional>
#include <string>
#include <vector>

#include "ops/action_heads.h"

namespace rlir {

inline constexpr const char* kInverseRewardSchema =
    "inverse_reward(Tensor button_logits, Tensor camera_logits, Tensor actions, "
    "Tensor? degrees=None, Tensor? frame_mask=None, *, int[] axis_sizes, int[] group_sizes, "
    "int[] button_classes, int[] button_opponents, int[] command_sizes, "
    "int[] command_classes, float[] edges, float[] weights, str mode='factor') "
    "-> (Tensor, Tensor)";

inline void check_reward_input(const char* name, const torch::stable::Tensor& x,
                               const torch::stable::Tensor& like,
                               torch::headeronly::ScalarType dtype, int64_t last) {
  const std::string what = std::string("inverse_reward: ") + name;
  const int64_t b = like.size(0), t = like.size(1);
  RLIR_CHECK(x.device() == like.device(), what,
             " must be on the device of button_logits, got another device");
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
inline Ints command_offsets(const HeadTables& tables, const Ints& sizes, const Ints& classes) {
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

inline double sum_of_weights(const HeadTables& tables, const std::vector<double>& weights) {
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

// What of a call is not tensors, checked.
struct RewardOptions {
  Ints offsets;  // of each factor's commands
  double total_weight;
  bool joint;
};

inline RewardOptions check_inverse_reward(
    const HeadTables& tables, const torch::stable::Tensor& keys,
    const torch::stable::Tensor& actions, const std::optional<torch::stable::Tensor>& degrees,
    const std::optional<torch::stable::Tensor>& frame_mask, const Ints& command_sizes,
    const Ints& command_classes, const std::vector<double>& edges,
    const std::vector<double>& weights, const std::string& mode) {
  using torch::headeronly::ScalarType;
  const int64_t axes = tables.heads().axes;
  check_reward_input("actions", actions, keys, ScalarType::Long, tables.factors());
  if (degrees) check_reward_input("degrees", *degrees, keys, ScalarType::Float, axes);
  if (frame_mask) check_reward_input("frame_mask", *frame_mask, keys, ScalarType::Bool, -1);
  RewardOptions options;
  options.offsets = command_offsets(tables, command_sizes, command_classes);
  options.total_weight = sum_of_weights(tables, weights);
  RLIR_CHECK(mode == "factor" || mode == "joint",
             "inverse_reward: mode must be 'factor' or 'joint', got '", mode, "'");
  options.joint = mode == "joint";
  size_t wanted = 0;
  for (int64_t f = 0; f < axes; ++f) wanted += static_cast<size_t>((tables.size(f) - 1) / 2);
  RLIR_CHECK(edges.size() == wanted, "inverse_reward: edges must be ", wanted, ", got ",
             edges.size());
  return options;
}

}  // namespace rlir
