// Group-relative advantages (GRPO). One build per instruction set; raw pointers only.
//
//   A_i = clip(baseline_i / (deviation + eps), -clip, clip)
//   baseline_i = r_i - mean(group)                   or  r_i - mean(the group without r_i)
//   deviation  = std(group), std(batch)              or  no division
//
// A row whose reward is not finite or whose mask is false takes no part and gets 0; so does
// every row of a group whose rewards are all equal.
#pragma once

#include <stdint.h>

#include "core/dtype.h"

namespace rlir::cpu {

enum class AdvantageScale : int32_t { kGroup, kBatch, kNone };

struct GroupAdvantage {
  // Row j of group g. Without `offsets`, groups have `group_size` rows and lie
  // reward_group_stride apart. With `offsets` [groups + 1], the group's rows are
  // order[offsets[g] + j], or offsets[g] + j where `order` is null; group strides are not used.
  // Strides count elements. `advantages` is contiguous in the order of the rows.
  const void* rewards;
  void* advantages;
  const bool* mask;  // or null: all rows count
  const int64_t* order;
  const int64_t* offsets;
  int64_t group_size;
  int64_t reward_group_stride, reward_stride;
  int64_t mask_group_stride, mask_stride;
  Dtype dtype;
  AdvantageScale scale;
  bool leave_one_out;
  bool unbiased;
  double eps;
  double clip;             // infinity: none
  double batch_deviation;  // for kBatch
};

// `values` is scratch of a whole number of these.
inline constexpr int64_t kGroupAdvantageLanes = 16;

// Advantages of groups [begin, end). `values` and `rows` hold as many elements as the largest
// group has rows, `values` rounded up to whole lanes. A group's advantages depend on its own rows
// alone (and on batch_deviation).
using GroupAdvantageKernel = void(const GroupAdvantage& args, int64_t begin, int64_t end,
                                  double* values, int64_t* rows);

// Deviation of all rows of groups [0, groups) that take part, 0 if there are too few. `values`
// and `rows` hold as many elements as there are rows, `values` rounded up to whole lanes.
using BatchDeviationKernel = double(const GroupAdvantage& args, int64_t groups, double* values,
                                    int64_t* rows);

namespace baseline {
GroupAdvantageKernel group_advantage;
BatchDeviationKernel batch_deviation;
}  // namespace baseline
namespace avx2 {
GroupAdvantageKernel group_advantage;
BatchDeviationKernel batch_deviation;
}  // namespace avx2
namespace avx512 {
GroupAdvantageKernel group_advantage;
BatchDeviationKernel batch_deviation;
}  // namespace avx512

}  // namespace rlir::cpu
