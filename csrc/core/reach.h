// What a query of the attention ops sees: masks by their description, never as a matrix.
//
// The stream: frame 0 is an image of S tokens; every later frame is a block of A action tokens and
// an image. A query at position p sees key slot k iff
//
//   low <= k < high  and  (k < own  or  tau(k) <= tau)
//
//   causal        high = p + 1;                        low = p + 1 - window
//   frame_causal  an image's query: high = the end of its image; others as causal
//   diagonal      a generated image's query (r, c): high = p + 1, own = the first slot of its
//                 image, tau = the step at which (r, c) is fed to the model; others as causal
//
//   tau(r, c)     r w + c + 1;  (r + 1) w in the last column but for the last row: such a slot is
//                 fed when the next row begins (docs/kernels/video_attention.md)
//
//   refreshed     as diagonal, but the rows of an image have a slot more, except for the last row:
//                 column C - 1 is a stand-in's for the row's last token, fed at (r + 1) w; column C
//                 is that token's, fed at r w + C. From then on nothing sees the stand-in, and
//                 nothing outside of its image ever does, nor in frames that are causal
//
// So S = R C, or R C + R - 1 where masks are refreshed.
//
// Positions before 0 see nothing. With a window of F frames, low is where the block of frame f - F
// + 1 begins.
//
// Internal linkage, as in core/dtype.h.
#pragma once

#include <stdint.h>

#include "core/dtype.h"

namespace rlir {

enum class MaskKind : int32_t { kCausal, kFrameCausal, kDiagonal, kRefreshed };

struct AttentionMask {
  MaskKind kind;
  int64_t image, action;         // S, A; 0 in a causal mask
  int64_t window;                // tokens or frames; 0: all
  int64_t rows, columns, ahead;  // of a diagonal or refreshed mask; ahead is w
  int64_t context;               // frames that are causal in such a mask
};

// Frame 0 and those after it are alike if the stream is thought to begin with an action block: slot
// 0 is `action` positions in.
RLIR_ANYWHERE static inline int64_t frame_of(const AttentionMask& m, int64_t position) {
  return (position + m.action) / (m.image + m.action);
}
// Where a frame's block begins; of frame 0 and those before, 0.
RLIR_ANYWHERE static inline int64_t block_start(const AttentionMask& m, int64_t frame) {
  return frame > 0 ? frame * (m.image + m.action) - m.action : 0;
}

// The step at which slot i of an image is fed, in a diagonal mask.
RLIR_ANYWHERE static inline int32_t tau_of_slot(const AttentionMask& m, int64_t i) {
  const int64_t r = i / m.columns, c = i % m.columns;
  const bool waits = c + 1 == m.columns && r + 1 < m.rows;
  return static_cast<int32_t>(waits ? (r + 1) * m.ahead : r * m.ahead + c + 1);
}

// Steps [first, end) at which queries of its image see a slot of a refreshed mask. Only those of
// stand-ins have an end.
struct Steps {
  int32_t first, end;
};
constexpr int32_t kForever = INT32_MAX;

// Of slot i of an image; of its actions where i < 0.
RLIR_ANYWHERE static inline Steps steps_of_slot(const AttentionMask& m, int64_t i) {
  if (i < 0) return {0, kForever};
  const int64_t r = i / (m.columns + 1), c = i % (m.columns + 1);
  const auto drawn =
      static_cast<int32_t>(r * m.ahead + m.columns);  // fed after the row's last draw
  if (c == m.columns) return {drawn, kForever};
  if (c + 1 < m.columns || r + 1 == m.rows) {
    return {static_cast<int32_t>(r * m.ahead + c + 1), kForever};
  }
  return {static_cast<int32_t>((r + 1) * m.ahead), drawn};
}

// The first stand-in's slot from k on; beyond all slots in other masks.
RLIR_ANYWHERE static inline int64_t next_stand_in(const AttentionMask& m, int64_t k) {
  if (m.kind != MaskKind::kRefreshed) return INT64_MAX;
  const int64_t block = m.image + m.action, row = m.columns + 1;
  const int64_t start = (k + m.action) / block * block;  // of the image of k, or after k
  const int64_t r = k < start ? 0 : (k - start + 1) / row;
  return (r + 1 < m.rows ? start + r * row : start + block) + m.columns - 1;
}

struct Reach {
  int64_t low, high, own;
  int32_t tau;
};

constexpr int64_t kNoOwn = INT64_MAX;
// Positions beyond see what this one sees: sums with it are still integers of 64 bits.
constexpr int64_t kFarPosition = int64_t{1} << 62;

// What a query at `position` sees of `keys` slots.
RLIR_ANYWHERE static inline Reach reach_of(const AttentionMask& m, int64_t position, int64_t keys) {
  position = position < -1 ? -1 : position > kFarPosition ? kFarPosition : position;
  Reach r{0, position + 1, kNoOwn, 0};
  if (m.kind == MaskKind::kCausal) {
    if (m.window > 0 && r.high > m.window) r.low = r.high - m.window;
  } else {
    const int64_t frame = frame_of(m, position);
    if (m.window > 0) r.low = block_start(m, frame - m.window + 1);
    const int64_t end = block_start(m, frame + 1), slot = position - (end - m.image);
    if (slot >= 0 && m.kind == MaskKind::kFrameCausal) r.high = end;
    if (slot >= 0 && m.kind >= MaskKind::kDiagonal && frame >= m.context) {
      r.own = end - m.image;
      r.tau = m.kind == MaskKind::kDiagonal ? tau_of_slot(m, slot) : steps_of_slot(m, slot).first;
    }
  }
  if (r.high > keys) r.high = keys;
  return r;
}

RLIR_ANYWHERE static inline int64_t slot_of(const AttentionMask& m, int64_t k) {
  return (k + m.action) % (m.image + m.action) - m.action;
}
// tau of key slot k, which is in an image; a query compares it only within its own.
RLIR_ANYWHERE static inline int32_t tau_of(const AttentionMask& m, int64_t k) {
  return tau_of_slot(m, slot_of(m, k));
}
RLIR_ANYWHERE static inline Steps steps_of(const AttentionMask& m, int64_t k) {
  return steps_of_slot(m, slot_of(m, k));
}

// Whether a query with this reach sees key slot k.
RLIR_ANYWHERE static inline bool sees_slot(const AttentionMask& m, const Reach& r, int64_t k) {
  if (k < r.low || k >= r.high) return false;
  if (m.kind != MaskKind::kRefreshed) return k < r.own || tau_of(m, k) <= r.tau;
  const Steps s = steps_of(m, k);
  return k < r.own ? s.end == kForever : s.first <= r.tau && r.tau < s.end;
}

}  // namespace rlir
