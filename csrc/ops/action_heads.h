// The lists by which decode_actions and inverse_reward describe an inverse dynamics model's heads,
// checked and turned into the kernels' tables (cpu/action_heads.h).
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <limits>
#include <numeric>
#include <string>
#include <vector>

#include "core/check.h"
#include "cpu/action_heads.h"
#include "ops/float_dtype.h"

namespace rlir {

using Ints = std::vector<int64_t>;

// Logits a thread should at least read: below, starting threads costs more than they save.
inline constexpr int64_t kLogitsPerThread = 1 << 16;

// button_classes[b]: the place of the button's class among the classes of all groups one after
// another, or -1 for a button without one. button_opponents[b]: bit i is set if button i, held
// as well, takes b's effect. Both are empty for class vectors.
class HeadTables {
 public:
  HeadTables(const std::string& op, const torch::stable::Tensor& keys,
             const torch::stable::Tensor& camera, Ints axis_sizes, Ints group_sizes,
             const Ints& button_classes, const Ints& button_opponents)
      : axis_sizes_(std::move(axis_sizes)), group_sizes_(std::move(group_sizes)) {
    for (const int64_t size : axis_sizes_) {
      RLIR_CHECK(size >= 1 && size < kLargest, op, ": axis_sizes must be >= 1, got ", size);
    }
    for (const int64_t size : group_sizes_) {
      RLIR_CHECK(size >= 1 && size < kLargest, op, ": group_sizes must be >= 1, got ", size);
    }
    RLIR_CHECK(!axis_sizes_.empty() || !group_sizes_.empty(), op,
               ": heads must have a factor, got none");
    buttons_of(op, button_classes, button_opponents);
    heads_.axes = static_cast<int64_t>(axis_sizes_.size());
    heads_.groups = static_cast<int64_t>(group_sizes_.size());
    heads_.axis_sizes = axis_sizes_.data();
    heads_.group_sizes = group_sizes_.data();
    heads_.buttons = static_cast<int64_t>(button_classes.size());
    heads_.scope = scope_.data();
    heads_.bit = bit_.data();
    heads_.code = code_.data();
    heads_.field_shift = shift_.data();

    const int64_t bins = std::accumulate(axis_sizes_.begin(), axis_sizes_.end(), int64_t{0});
    const int64_t classes = std::accumulate(group_sizes_.begin(), group_sizes_.end(), int64_t{0});
    heads_.keys = rows(op + ": button_logits", keys,
                       heads_.buttons > 0 ? 2 * heads_.buttons : classes, keys, "button_logits");
    heads_.camera = rows(op + ": camera_logits", camera, bins, keys, "button_logits");
  }
  HeadTables(const HeadTables&) = delete;
  HeadTables& operator=(const HeadTables&) = delete;

  const cpu::ActionHeads& heads() const { return heads_; }
  int64_t factors() const { return heads_.axes + heads_.groups; }
  // Classes of factor f of the heads.
  int64_t size(int64_t f) const {
    return f < heads_.axes ? axis_sizes_[f] : group_sizes_[f - heads_.axes];
  }
  int64_t logits() const { return heads_.keys.classes + heads_.camera.classes; }

 private:
  static constexpr int64_t kLargest = int64_t{1} << 31;

  void buttons_of(const std::string& op, const Ints& classes, const Ints& opponents) {
    RLIR_CHECK(classes.size() == opponents.size(), op, ": button_opponents must have ",
               classes.size(), " elements, got ", opponents.size());
    RLIR_CHECK(classes.size() < 64, op, ": buttons must be at most 63, got ", classes.size());
    if (classes.empty()) return;
    int64_t bits = 0;  // of the word that has a field for each group's class
    Ints starts;
    for (int64_t start = 0; const int64_t size : group_sizes_) {
      starts.push_back(start);
      start += size;
      shift_.push_back(bits);
      bits += std::max(1, static_cast<int>(std::bit_width(static_cast<uint64_t>(size - 1))));
    }
    RLIR_CHECK(bits <= 64, op, ": group_sizes must fit 64 bits, got ", bits);
    scope_.assign(classes.size(), 0);
    bit_.assign(classes.size(), 1);  // 0 is not 1: never counts
    code_.assign(classes.size(), 0);
    for (size_t b = 0; b < classes.size(); ++b) {
      if (classes[b] == -1) continue;
      size_t g = 0;
      while (g < starts.size() && classes[b] >= starts[g] + group_sizes_[g]) ++g;
      RLIR_CHECK(classes[b] >= 0 && g < starts.size(), op,
                 ": button_classes must be -1 or a class of a group, got ", classes[b]);
      bit_[b] = uint64_t{1} << b;
      scope_[b] = bit_[b] | static_cast<uint64_t>(opponents[b]);
      code_[b] = static_cast<uint64_t>(classes[b] - starts[g]) << shift_[g];
    }
    // Keys of a group that could count together would mix their classes up.
    for (size_t a = 0; a < classes.size(); ++a) {
      for (size_t b = 0; b < a; ++b) {
        const bool same = classes[a] >= 0 && classes[b] >= 0 &&
                          group_of(starts, classes[a]) == group_of(starts, classes[b]);
        RLIR_CHECK(!same || ((scope_[a] & bit_[b]) != 0 && (scope_[b] & bit_[a]) != 0), op,
                   ": button_opponents must name the other keys of a group, got none for button ",
                   a);
      }
    }
  }

  static int64_t group_of(const Ints& starts, int64_t place) {
    return std::upper_bound(starts.begin(), starts.end(), place) - starts.begin();
  }

  static cpu::LogitRows rows(const std::string& what, const torch::stable::Tensor& x,
                             int64_t classes, const torch::stable::Tensor& like,
                             const char* like_name) {
    RLIR_CHECK(x.device() == like.device(), what, " must be on the device of ", like_name,
               ", got another device");
    RLIR_CHECK(x.dim() == 3 && x.size(2) == classes, what,
               " must have shape [trajectories, frames, ", classes, "], got ", x.dim(),
               " dimensions and a last one of ", x.dim() > 0 ? x.size(x.dim() - 1) : 0);
    RLIR_CHECK(x.size(0) == like.size(0) && x.size(1) == like.size(1), what,
               " must have the trajectories and frames of ", like_name, ", got ", x.size(0),
               " and ", x.size(1));
    const Dtype dtype = float_dtype(what.c_str(), x);
    return {x.const_data_ptr(), dtype, x.stride(0), x.stride(1), x.stride(2), classes};
  }

  Ints axis_sizes_, group_sizes_, shift_;
  std::vector<uint64_t> scope_, bit_, code_;
  cpu::ActionHeads heads_{};
};

// What a thread works in.
class ActionBuffers {
 public:
  explicit ActionBuffers(const HeadTables& tables)
      : logits_(tables.logits()), numbers_((2 * cpu::kActionBlock + 1) * tables.factors()) {
    scratch.keys = logits_.data();
    scratch.camera = logits_.data() + tables.heads().keys.classes;
    scratch.classes = numbers_.data();
    scratch.matches = scratch.classes + tables.factors() * cpu::kActionBlock;
    scratch.counts = scratch.matches + tables.factors() * cpu::kActionBlock;
  }
  cpu::ActionScratch scratch;

 private:
  std::vector<double> logits_;
  Ints numbers_;
};

// Trajectories a thread should at least take.
inline int64_t action_grain(const HeadTables& tables, int64_t frames) {
  return std::max<int64_t>(1, kLogitsPerThread / std::max<int64_t>(1, frames * tables.logits()));
}

}  // namespace rlir
