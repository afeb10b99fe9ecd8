// The inverse reward on a GPU. Formula: cpu/inverse_reward.h, whose bits this kernel reproduces.
// Raw pointers and a stream; nothing here waits for the device.
#pragma once

#include "cuda/action_heads.cuh"

namespace rlir::cuda {

struct InverseReward {
  ActionHeads heads;
  int64_t trajectories, frames;
  // As in cpu::InverseReward.
  const int64_t* actions;
  int64_t action_strides[3];
  const float* degrees;
  int64_t degree_strides[3];
  const bool* mask;
  int64_t mask_strides[2];
  int32_t command_sizes[kMaxFactors], command_offsets[kMaxFactors], command_classes[kMaxCommands];
  int32_t edge_offsets[kMaxFactors];  // of the axes
  double edges[kMaxBins / 2], weights[kMaxFactors];
  double total_weight;
  float* reward;   // [trajectories]
  float* matches;  // [trajectories, frames, axes + groups]
  bool joint;
};

// Returns an error code of launch(). At least one trajectory. A command that is out of range gives
// NaN, and a device assertion fails.
int inverse_reward(const InverseReward& args, void* stream);

}  // namespace rlir::cuda
