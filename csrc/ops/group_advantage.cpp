// rlir::group_advantage: schema, checks and CPU dispatch. Formula: cpu/group_advantage.h.
#include "cpu/group_advantage.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <optional>
#include <string>
#include <vector>

#include "core/check.h"
#include "core/cpu_isa.h"

namespace rlir {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Rows a thread should at least have: below, starting threads costs more than they save.
constexpr int64_t kRowsPerThread = 1 << 14;

Dtype dtype_of(const Tensor& rewards) {
  switch (rewards.scalar_type()) {
    case ScalarType::Double:
      return Dtype::kFloat64;
    case ScalarType::Float:
      return Dtype::kFloat32;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    case ScalarType::Half:
      return Dtype::kFloat16;
    default:
      fail("group_advantage: rewards must be float64, float32, bfloat16 or float16, got dtype ",
           static_cast<int>(rewards.scalar_type()));
  }
}

cpu::AdvantageScale scale_of(const std::string& name) {
  if (name == "group") return cpu::AdvantageScale::kGroup;
  if (name == "batch") return cpu::AdvantageScale::kBatch;
  if (name == "none") return cpu::AdvantageScale::kNone;
  fail("group_advantage: scale must be 'group', 'batch' or 'none', got '", name, "'");
}

bool leave_one_out(const std::string& baseline) {
  if (baseline == "leave_one_out") return true;
  if (baseline == "mean") return false;
  fail("group_advantage: baseline must be 'mean' or 'leave_one_out', got '", baseline, "'");
}

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

void check_mask(const Tensor& mask, const Tensor& rewards) {
  RLIR_CHECK(mask.is_cpu(), "group_advantage: mask must be on the CPU, got another device");
  RLIR_CHECK(mask.scalar_type() == ScalarType::Bool,
             "group_advantage: mask must be bool, got dtype ",
             static_cast<int>(mask.scalar_type()));
  bool same = mask.dim() == rewards.dim();
  for (int64_t d = 0; same && d < rewards.dim(); ++d) same = mask.size(d) == rewards.size(d);
  RLIR_CHECK(same, "group_advantage: mask must have the shape of rewards, got another shape");
}

Tensor group_advantage_cpu(const Tensor& rewards, const std::optional<Tensor>& group_ids,
                           const std::optional<Tensor>& mask, std::optional<int64_t> group_size,
                           std::string scale, std::string baseline, double eps,
                           std::optional<double> clip, bool unbiased) {
  RLIR_CHECK(rewards.dim() == 1 || rewards.dim() == 2,
             "group_advantage: rewards must be [groups, members] or [rows], got ", rewards.dim(),
             " dimensions");
  RLIR_CHECK(std::isfinite(eps) && eps >= 0.0, "group_advantage: eps must be finite and >= 0, got ",
             eps);
  RLIR_CHECK(!clip || *clip > 0.0, "group_advantage: clip must be > 0, got ", *clip);
  if (mask) check_mask(*mask, rewards);
  const int64_t n = rewards.numel();

  cpu::GroupAdvantage args{};
  args.dtype = dtype_of(rewards);
  args.scale = scale_of(scale);
  args.leave_one_out = leave_one_out(baseline);
  args.unbiased = unbiased;
  args.eps = eps;
  args.clip = clip.value_or(std::numeric_limits<double>::infinity());

  Grouping grouping;
  int64_t groups = 0, largest = 0;
  const int64_t last = rewards.dim() - 1;
  args.reward_stride = rewards.stride(last);
  args.mask_stride = mask ? mask->stride(last) : 0;
  if (rewards.dim() == 2) {
    RLIR_CHECK(!group_ids && !group_size,
               "group_advantage: rewards [groups, members] must come without group_ids and "
               "group_size, got one of them");
    groups = rewards.size(0);
    args.group_size = rewards.size(1);
    args.reward_group_stride = rewards.stride(0);
    args.mask_group_stride = mask ? mask->stride(0) : 0;
  } else if (group_size) {
    RLIR_CHECK(!group_ids,
               "group_advantage: rewards [rows] must come with group_ids or "
               "group_size, got both");
    RLIR_CHECK(*group_size >= 1, "group_advantage: group_size must be >= 1, got ", *group_size);
    RLIR_CHECK(n % *group_size == 0, "group_advantage: group_size must divide the ", n,
               " rewards, got ", *group_size);
    groups = n / *group_size;
    args.group_size = *group_size;
    args.reward_group_stride = *group_size * args.reward_stride;
    args.mask_group_stride = *group_size * args.mask_stride;
  } else {
    RLIR_CHECK(group_ids,
               "group_advantage: rewards [rows] must come with group_ids or "
               "group_size, got neither");
    RLIR_CHECK(group_ids->is_cpu(),
               "group_advantage: group_ids must be on the CPU, got another device");
    RLIR_CHECK(group_ids->scalar_type() == ScalarType::Long,
               "group_advantage: group_ids must be int64, got dtype ",
               static_cast<int>(group_ids->scalar_type()));
    RLIR_CHECK(group_ids->dim() == 1 && group_ids->size(0) == n,
               "group_advantage: group_ids must have shape (", n, ",), got another shape");
    grouping = group_rows(group_ids->const_data_ptr<int64_t>(), group_ids->stride(0), n);
    groups = grouping.groups();
    for (int64_t g = 0; g < groups; ++g) {
      largest = std::max(largest, grouping.offsets[g + 1] - grouping.offsets[g]);
    }
    args.order = grouping.order.empty() ? nullptr : grouping.order.data();
    args.offsets = grouping.offsets.data();
  }
  if (args.offsets == nullptr) largest = args.group_size;

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
  m.def(
      "group_advantage(Tensor rewards, Tensor? group_ids=None, Tensor? mask=None, *, "
      "SymInt? group_size=None, str scale='group', str baseline='mean', float eps=1e-4, "
      "float? clip=None, bool unbiased=True) -> Tensor",
      {at::Tag::pt2_compliant_tag});
}

STABLE_TORCH_LIBRARY_IMPL(rlir, CPU, m) {
  m.impl("group_advantage", TORCH_BOX(&group_advantage_cpu));
}

}  // namespace rlir
