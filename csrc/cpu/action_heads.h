// Reading an action off the heads of an inverse dynamics model: what decode_actions and
// inverse_reward have in common.
//
// Camera axes come first among the factors: class = argmax of the axis's bins. Key groups follow:
//   class vectors   class = argmax of the group's classes
//   2-way buttons   key b is held where logit[b][1] > logit[b][0]; it counts if none of its
//                   opponents (the other keys of its group, keys it conflicts with) is held, and
//                   then its group has its class; a group without a key that counts has class 0
// Of equal largest logits the first wins. A logit that is NaN or infinite makes its factor
// unreadable (class -1); buttons cancel each other out, so there it takes all key groups.
//
// The result is integers from comparisons: the same on every instruction set.
#pragma once

#include <stdint.h>

#include "core/dtype.h"

namespace rlir::cpu {

// Logits [trajectories, frames, classes]; strides count elements.
struct LogitRows {
  const void* data;
  Dtype dtype;
  int64_t trajectory_stride, frame_stride, class_stride;
  int64_t classes;
};

struct ActionHeads {
  LogitRows keys;    // class vectors one after another, or (not held, held) of each button
  LogitRows camera;  // bins of the axes, one after another
  int64_t axes, groups;
  const int64_t* axis_sizes;   // [axes] bins
  const int64_t* group_sizes;  // [groups] classes
  // Of 2-way buttons; 0 and null for class vectors. With `held` a bit for each button:
  // button b counts if (held & scope[b]) == bit[b], and then sets `code[b]` in a word that has a
  // field for each group's class, at field_shift[group].
  int64_t buttons;
  const uint64_t *scope, *bit, *code;  // [buttons]
  const int64_t* field_shift;          // [groups]
};

struct DecodeActions {
  ActionHeads heads;
  int64_t frames;         // of a trajectory
  const double* centres;  // degrees of each bin of each axis, one after another
  int64_t* classes;       // [trajectories, frames, axes + groups]
  float* degrees;         // [trajectories, frames, axes]
};

struct InverseReward {
  ActionHeads heads;
  int64_t frames;
  // Commanded classes [trajectories, frames, axes + groups] and, or null, degrees
  // [trajectories, frames, axes], which then stand in for the classes of the axes.
  const int64_t* actions;
  int64_t action_strides[3];
  const float* degrees;
  int64_t degree_strides[3];
  const bool* mask;  // [trajectories, frames] or null
  int64_t mask_strides[2];
  // A commanded class c < command_sizes[f] asks for the head's class
  // command_classes[command_offsets[f] + c].
  const int64_t *command_sizes, *command_offsets, *command_classes;
  // Positive edges between bins of an axis, (size - 1) / 2 each, ascending.
  const double* edges;
  const double* weights;  // [axes + groups]
  double total_weight;
  bool joint;
  float* reward;   // [trajectories]
  float* matches;  // [trajectories, frames, axes + groups]
};

// Frames are worked on in blocks of this many, a factor at a time.
inline constexpr int64_t kActionBlock = 64;

// Scratch of a thread: a row of logits each, then kActionBlock elements a factor each, and the
// counts of a trajectory.
struct ActionScratch {
  double* keys;
  double* camera;
  int64_t* classes;  // [axes + groups, kActionBlock]
  int64_t* matches;  // [axes + groups, kActionBlock]
  int64_t* counts;   // [axes + groups]
};

}  // namespace rlir::cpu
