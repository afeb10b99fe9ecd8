// Decoding actions off an inverse dynamics model's heads. One build per instruction set; raw
// pointers only.
//
//   classes[b, t, f] = what head f of frame t reads (cpu/action_heads.h), -1 if it cannot be read
//   degrees[b, t, a] = centre of the bin classes[b, t, a] of camera axis a, NaN if it is -1
#pragma once

#include "cpu/action_heads.h"

namespace rlir::cpu {

// Trajectories [begin, end).
using DecodeActionsKernel = void(const DecodeActions& args, int64_t begin, int64_t end,
                                 const ActionScratch& scratch);

namespace baseline {
DecodeActionsKernel decode_actions;
}
namespace avx2 {
DecodeActionsKernel decode_actions;
}
namespace avx512 {
DecodeActionsKernel decode_actions;
}

}  // namespace rlir::cpu
