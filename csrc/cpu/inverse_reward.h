// The inverse reward (RLIR, arXiv 2509.23958): what an inverse dynamics model reads off a video
// against what was commanded. One build per instruction set; raw pointers only.
//
//   m[b, t, f] = 1 if head f of frame t reads the commanded class, else 0 (cpu/action_heads.h)
//   reward[b]  = sum_t sum_f w_f m[b, t, f] / (n_b sum_f w_f)      mode "factor"
//   reward[b]  = sum_t [m[b, t, f] = 1 for all f with w_f > 0] / n_b  mode "joint"
//
// t runs over the n_b frames whose mask is true. A factor that cannot be read has m = NaN, and so
// is the reward of its trajectory, and that of a trajectory without frames.
#pragma once

#include "cpu/action_heads.h"

namespace rlir::cpu {

// Trajectories [begin, end). Returns the place (trajectory * frames + frame) * factors + factor
// of the first command that is out of range, or -1. Commands of masked frames are not looked at.
using InverseRewardKernel = int64_t(const InverseReward& args, int64_t begin, int64_t end,
                                    const ActionScratch& scratch);

namespace baseline {
InverseRewardKernel inverse_reward;
}
namespace avx2 {
InverseRewardKernel inverse_reward;
}
namespace avx512 {
InverseRewardKernel inverse_reward;
}

}  // namespace rlir::cpu
