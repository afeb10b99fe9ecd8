// Formula: inverse_reward.h. Compiled once per instruction set, RLIR_ISA names it.
//
// Why one kernel: see decode_actions.cpp; the comparison and the reduction come almost for free
// once a frame's classes are in registers.
//
// Why the same bits everywhere: matches are counted as integers, a factor at a time, so no order
// of summation can show. The weighted sum of the counts is one short chain in double.
#include "cpu/inverse_reward.h"

#include "cpu/read_action.h"

namespace rlir::cpu::RLIR_ISA {
namespace {

// The head's class that a command in degrees asks for, or -1 for NaN. A turn on the edge of two
// bins goes to the one further from rest, on both sides alike.
inline int64_t bin_of(double degrees, const double* edges, int64_t size) {
  if (degrees != degrees) return -1;
  const int64_t half = (size - 1) / 2;
  int64_t bin = half;
  for (int64_t i = 0; i < half; ++i) {
    bin += (degrees >= edges[i] ? 1 : 0) - (degrees <= -edges[i] ? 1 : 0);
  }
  return bin;
}

// Frames of a block: which take part, and where their commands are.
struct Rows {
  bool here[kActionBlock];
  int64_t actions[kActionBlock];
  int64_t degrees[kActionBlock];
};

// Compares one factor of a block with its commands: 1 or 0 each. False if a command is out of
// range. Frames that take no part have 0.
inline bool match_classes(const InverseReward& a, int64_t f, const Rows& rows,
                          const int64_t* classes, int64_t* matches) {
  const int64_t* actions = a.actions + f * a.action_strides[2];
  const int64_t* table = a.command_classes + a.command_offsets[f];
  const uint64_t size = static_cast<uint64_t>(a.command_sizes[f]);
  int64_t bad = 0;
  for (int64_t r = 0; r < kActionBlock; ++r) {
    const uint64_t any = static_cast<uint64_t>(actions[rows.actions[r]]);
    const uint64_t command = rows.here[r] ? any : 0;
    bad |= command >= size ? 1 : 0;
    const int64_t wanted = table[command >= size ? 0 : command];
    matches[r] = wanted == classes[r] && rows.here[r] ? 1 : 0;
  }
  return bad == 0;
}

inline bool match_degrees(const InverseReward& a, int64_t f, const double* edges, const Rows& rows,
                          const int64_t* classes, int64_t* matches) {
  bool ok = true;
  for (int64_t r = 0; r < kActionBlock; ++r) {
    const double any = a.degrees[rows.degrees[r] + f * a.degree_strides[2]];
    const int64_t wanted = bin_of(rows.here[r] ? any : 0.0, edges, a.heads.axis_sizes[f]);
    ok &= wanted >= 0;
    matches[r] = wanted == classes[r] && rows.here[r] ? 1 : 0;
  }
  return ok;
}

// Compares a block. Returns the place of the first bad command, or -1.
inline int64_t match_block(const InverseReward& a, const Rows& rows, int64_t first_row,
                           const ActionScratch& scratch) {
  const int64_t axes = a.heads.axes, factors = axes + a.heads.groups;
  const double* edges = a.edges;
  for (int64_t f = 0; f < factors; ++f) {
    const int64_t* classes = scratch.classes + f * kActionBlock;
    int64_t* matches = scratch.matches + f * kActionBlock;
    bool ok;
    if (a.degrees != nullptr && f < axes) {
      ok = match_degrees(a, f, edges, rows, classes, matches);
      edges += (a.heads.axis_sizes[f] - 1) / 2;
    } else {
      ok = match_classes(a, f, rows, classes, matches);
    }
    if (ok) continue;
    for (int64_t r = 0; r < kActionBlock; ++r) {
      if (!rows.here[r]) continue;
      bool bad;
      if (a.degrees != nullptr && f < axes) {
        const float x = a.degrees[rows.degrees[r] + f * a.degree_strides[2]];
        bad = x != x;
      } else {
        const int64_t command = a.actions[rows.actions[r] + f * a.action_strides[2]];
        bad = command < 0 || command >= a.command_sizes[f];
      }
      if (bad) return (first_row + r) * factors + f;
    }
  }
  return -1;
}

inline float reward_of(const InverseReward& a, const int64_t* counts, int64_t joint,
                       int64_t frames) {
  double sum = static_cast<double>(joint), weight = 1.0;
  if (!a.joint) {
    sum = 0.0;
    for (int64_t f = 0; f < a.heads.axes + a.heads.groups; ++f) {
      sum += a.weights[f] * static_cast<double>(counts[f]);
    }
    weight = a.total_weight;
  }
  return static_cast<float>(sum / (weight * static_cast<double>(frames)));
}

}  // namespace

int64_t inverse_reward(const InverseReward& a, int64_t begin, int64_t end,
                       const ActionScratch& scratch) {
  const ActionHeads& h = a.heads;
  const int64_t factors = h.axes + h.groups, last = end * a.frames;
  const float nan = __builtin_nanf("");
  if (a.frames == 0) {
    for (int64_t b = begin; b < end; ++b) a.reward[b] = nan;
    return -1;
  }
  Place at = {begin, 0};
  int64_t frames = 0, joint = 0;  // of the trajectory so far
  bool readable = true;
  for (int64_t f = 0; f < factors; ++f) scratch.counts[f] = 0;
  for (int64_t row = begin * a.frames; row < last; row += kActionBlock) {
    const int64_t count = last - row < kActionBlock ? last - row : kActionBlock;
    const Place first = at;
    Rows rows = {};  // rows beyond the last: not here, and the first element's commands
    for (int64_t r = 0; r < count; ++r, at.next(a.frames)) {
      rows.here[r] = a.mask == nullptr ||
                     a.mask[at.trajectory * a.mask_strides[0] + at.frame * a.mask_strides[1]];
      rows.actions[r] = at.trajectory * a.action_strides[0] + at.frame * a.action_strides[1];
      rows.degrees[r] = at.trajectory * a.degree_strides[0] + at.frame * a.degree_strides[1];
    }
    const bool all_readable = read_block(h, first, count, a.frames, rows.here, scratch);
    const int64_t bad = match_block(a, rows, row, scratch);
    if (bad >= 0) return bad;
    int64_t missed[kActionBlock] = {};
    for (int64_t f = 0; f < factors; ++f) {
      const int64_t required = a.weights[f] > 0.0 ? 1 : 0;
      const int64_t* matches = scratch.matches + f * kActionBlock;
      for (int64_t r = 0; r < kActionBlock; ++r) missed[r] |= required & ~matches[r];
    }
    float* out = a.matches + row * factors;
    for (int64_t r = 0; r < count; ++r) {
      for (int64_t f = 0; f < factors; ++f) {
        *out++ = static_cast<float>(scratch.matches[f * kActionBlock + r]);
      }
    }
    // Trajectories, or what of them is in this block.
    Place p = first;
    for (int64_t r = 0; r < count;) {
      const int64_t left = a.frames - p.frame, here = count - r < left ? count - r : left;
      for (int64_t f = 0; f < factors; ++f) {
        const int64_t* matches = scratch.matches + f * kActionBlock + r;
        int64_t sum = 0;
        for (int64_t i = 0; i < here; ++i) sum += matches[i];
        scratch.counts[f] += sum;
      }
      for (int64_t i = r; i < r + here; ++i) {
        frames += rows.here[i] ? 1 : 0;
        joint += rows.here[i] && missed[i] == 0 ? 1 : 0;
      }
      if (!all_readable) {
        for (int64_t i = r; i < r + here; ++i) {
          for (int64_t f = 0; f < factors && rows.here[i]; ++f) {
            if (scratch.classes[f * kActionBlock + i] >= 0) continue;
            a.matches[(row + i) * factors + f] = nan;
            readable = false;
          }
        }
      }
      r += here;
      p.frame += here;
      if (p.frame < a.frames) break;
      a.reward[p.trajectory] =
          readable && frames > 0 ? reward_of(a, scratch.counts, joint, frames) : nan;
      p = {p.trajectory + 1, 0};
      frames = joint = 0;
      readable = true;
      for (int64_t f = 0; f < factors; ++f) scratch.counts[f] = 0;
    }
  }
  return -1;
}

}  // namespace rlir::cpu::RLIR_ISA
