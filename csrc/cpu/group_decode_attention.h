// Attention of a decoding step of rollouts that share a prompt, in two passes over the blocks of
// cpu/video_attention.h, whose formulas, order and bits these are. One build per instruction set.
//
//   prefix   the queries of all members are lanes of the same panels: whole blocks of the prefix
//            are read once a group. A lane's state (maximum, l, sums) is left behind.
//   suffix   each member goes on from there alone: first the block in which the prefix ends, as
//            part of the member's own slots, then its suffix.
//
// The state is a lane's whole memory of the blocks that it has seen, so that the second pass
// merges exactly: as if one pass had gone over prefix and suffix.
#pragma once

#include "cpu/video_attention.h"

namespace rlir::cpu {

// Floats of the state of a lane.
inline int64_t decode_state(int64_t dim) { return dim + 2; }

// Panels [first, first + count) of the lanes of all members, at most kPanelsTogether, over blocks
// [0, blocks); state [lanes].
using DecodePrefix = void(const VideoAttention& args, int64_t first, int64_t count, int64_t blocks,
                          float* state, void* scratch);
// Those of the lanes of one member, whose states begin at `state`, from block `blocks` on, and the
// results. With blocks = 0 the states are not looked at. Or one panel of each of `heads` key heads,
// at most kHeadsTogether, with a call each and `state_stride` floats between their states.
struct MemberHeads {
  const VideoAttention* calls;
  int64_t heads;
  const float* state;
  int64_t state_stride;
  const KeysAfter* after;  // or null
};
using DecodeSuffix = void(const MemberHeads& args, int64_t first, int64_t count, int64_t blocks,
                          void* scratch);

#define RLIR_GROUP_DECODE_BUILD(isa) \
  namespace isa {                    \
  DecodePrefix decode_prefix;        \
  DecodeSuffix decode_suffix;        \
  }
RLIR_GROUP_DECODE_BUILD(baseline)
RLIR_GROUP_DECODE_BUILD(avx2)
RLIR_GROUP_DECODE_BUILD(avx512)
RLIR_GROUP_DECODE_BUILD(avx512_bf16)
RLIR_GROUP_DECODE_BUILD(amx)
#undef RLIR_GROUP_DECODE_BUILD

}  // namespace rlir::cpu
