// rlir::group_advantage on the CPU.
#include "ops/group_advantage.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <numeric>
#include <optional>
#include <string>
#include <vector>

#include "core/cpu_isa.h"

namespace rlir {
namespace {

using torch::stable::Tensor;

// Rows a thread should at least have: below, starting threads costs more than they save.
constexpr int64_t kRowsPerThread = 1 << 14;

// Rows sorted by group; rows of a group keep their order.
struct Grouping {
  std::vector<int64_t> order;    // empty: the rows already lie group by group
  std::vector<int64_t> offsets;  // [groups + 1]; a group may be empty
  int64_t groups() const { return static_cast<int64_t>(offsets.size()) - 1; }
};

Grouping group_rows(const int64_t* ids, int64_t stride, int64_t n) {
  int64_t largest = -1;
  bool sorted = true;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t id = ids[i * stride];
    RLIR_CHECK(id >= 0, "group_advantage: group_ids must be >= 0, got ", id);
    sorted = sorted && id >= largest;
    largest = std::max(largest, id);
  }
  Grouping result;
  if (!sorted && largest < 4 * n + 64) {  // dense ids: counting sort
    result.offsets.assign(static_cast<size_t>(largest) + 2, 0);
    for (int64_t i = 0; i < n; ++i) ++result.offsets[ids[i * stride] + 1];
    std::partial_sum(result.offsets.begin(), result.offsets.end(), result.offsets.begin());
    std::vector<int64_t> next(result.offsets.begin(), result.offsets.end() - 1);
    result.order.resize(n);
    for (int64_t i = 0; i < n; ++i) result.order[next[ids[i * stride]]++] = i;
    return result;
  }
  if (!sorted) {
    result.order.resize(n);
    std::iota(result.order.begin(), result.order.end(), int64_t{0});
    std::stable_sort(result.order.begin(), result.order.end(),
                     [=](int64_t a, int64_t b) { return ids[a * stride] < ids[b * stride]; });
  }
  const auto id_at = [&](int64_t p) { return ids[(sorted ? p : result.order[p]) * stride]; };
  for (int64_t p = 0; p < n; ++p) {
    if (p == 0 || id_at(p) != id_at(p - 1)) result.offsets.push_back(p);
  }
  result.offsets.push_back(n);
  return result;
}

int64_t whole_lanes(int64_t n) {
  return (n + cpu::kGroupAdvantageLanes - 1) / cpu::kGroupAdvantageLanes *
         cpu::kGroupAdvantageLanes;
}

Tensor group_advantage_cpu(const Tensor& rewards, const std::optional<Tensor>& group_ids,
                           const std::optional<Tensor>& mask, std::optional<int64_t> group_size,
                           std::string scale, std::string baseline, double eps,
                           std::optional<double> clip, bool unbiased) {
  auto args = group_advantage_arguments<cpu::GroupAdvantage>(rewards, group_ids, mask, group_size,
                                                             scale, baseline, eps, clip, unbiased);
  const int64_t n = rewards.numel();
  Grouping grouping;
  int64_t groups = rewards.dim() == 2 ? rewards.size(0) : 0, largest = args.group_size;
  if (group_size) groups = n / *group_size;
  if (group_ids) {
    grouping = group_rows(group_ids->const_data_ptr<int64_t>(), group_ids->stride(0), n);
    groups = grouping.groups();
    for (int64_t g = 0; g < groups; ++g) {
      largest = std::max(largest, grouping.offsets[g + 1] - grouping.offsets[g]);
    }
    args.order = grouping.order.empty() ? nullptr : grouping.order.data();
    args.offsets = grouping.offsets.data();
  }

  Tensor advantages = torch::stable::new_empty(rewards, rewards.sizes());
  if (n == 0) return advantages;
  args.rewards = rewards.const_data_ptr();
  args.mask = mask ? mask->const_data_ptr<bool>() : nullptr;
  args.advantages = advantages.mutable_data_ptr();

  if (args.scale == cpu::AdvantageScale::kBatch) {
    // One thread, rows in the order of the batch: the sum must not depend on threads or ids.
    std::vector<double> values(whole_lanes(n));
    std::vector<int64_t> rows(n);
    cpu::GroupAdvantage batch = args;
    const int64_t all[2] = {0, n};
    if (args.offsets != nullptr) {
      batch.order = nullptr;
      batch.offsets = all;
    }
    const int64_t parts = args.offsets != nullptr ? 1 : groups;
    args.batch_deviation =
        RLIR_CPU_KERNEL(batch_deviation)(batch, parts, values.data(), rows.data());
  }
  const auto kernel = RLIR_CPU_KERNEL(group_advantage);
  const int64_t grain = std::max<int64_t>(1, kRowsPerThread / std::max<int64_t>(1, n / groups));
  torch::stable::parallel_for(0, groups, grain, [&](int64_t begin, int64_t end) {
    std::vector<double> values(whole_lanes(largest));
    std::vector<int64_t> rows(largest);
    kernel(args, begin, end, values.data(), rows.data());
  });
  return advantages;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(rlir, m) {
  m.def(kGroupAdvantageSchema, {at::Tag::pt2_compliant_tag});
}

STABLE_TORCH_LIBRARY_IMPL(rlir, CPU, m) {
  m.impl("group_advantage", TORCH_BOX(&group_advantage_cpu));
}

}  // namespace rlir
