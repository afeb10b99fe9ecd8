// Group-relative advantages (GRPO) on a GPU. Formula and rules: cpu/group_advantage.h, whose bits
// this kernel reproduces. Raw pointers and a stream; nothing here waits for the device.
#pragma once

#include <stdint.h>

#include "core/dtype.h"
#include "cpu/group_advantage.h"

namespace rlir::cuda {

struct GroupAdvantage {
  // Row j of group g is row g * group_size + j, its reward reward_group_stride * g +
  // reward_stride * j elements on. With `ids` [rows], the groups are the runs of equal values in
  // it, row j of the run that begins at p is row order[p + j], and group strides are not used. Rows
  // of a negative id get NaN and a device assertion fails.
  const void* rewards;
  void* advantages;  // contiguous, in the order of the rows
  const bool* mask;  // or null: all rows count
  const int64_t* ids;
  const int64_t* order;
  int64_t rows, group_size;  // rows is a multiple of group_size
  int64_t reward_group_stride, reward_stride;
  int64_t mask_group_stride, mask_stride;
  Dtype dtype;
  cpu::AdvantageScale scale;
  bool leave_one_out;
  bool unbiased;
  double eps;
  double clip;              // infinity: none
  double* batch_deviation;  // scratch of one element for kBatch
};

// Returns an error code of launch(). At least one row.
int group_advantage(const GroupAdvantage& args, void* stream);

}  // namespace rlir::cuda
