// Heads of an inverse dynamics model as decode_actions and inverse_reward hand them to a GPU.
// Meaning: cpu/action_heads.h. Tables travel by value, as parameters of a launch: they are lists of
// the host, and a copy to the device would need memory that outlives the call.
#pragma once

#include <stdint.h>

#include "cpu/action_heads.h"

namespace rlir::cuda {

inline constexpr int kMaxFactors = 64, kMaxButtons = 64, kMaxBins = 512, kMaxCommands = 1024;

struct ActionHeads {
  cpu::LogitRows keys, camera;
  int32_t axes, groups;
  int32_t buttons;              // 0: class vectors
  int32_t sizes[kMaxFactors];   // classes of axes, then of groups
  int32_t starts[kMaxFactors];  // of a factor's classes: among those of the axes, or of the groups
  // As in cpu::ActionHeads; a button that is not there has bit 1 and scope 0 and never counts.
  uint64_t scope[kMaxButtons], bit[kMaxButtons], code[kMaxButtons];
  int32_t field_shift[kMaxFactors + 1];  // [groups], and 64 behind the last
};

}  // namespace rlir::cuda
