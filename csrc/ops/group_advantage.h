// rlir::group_advantage: schema and checks, for every device. Formula: cpu/group_advantage.h.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cmath>
#include <limits>
#include <optional>
#include <string>

#include "core/check.h"
#include "cpu/group_advantage.h"
#include "ops/float_dtype.h"

namespace rlir {

inline constexpr const char* kGroupAdvantageSchema =
    "group_advantage(Tensor rewards, Tensor? group_ids=None, Tensor? mask=None, *, "
    "SymInt? group_size=None, str scale='group', str baseline='mean', float eps=1e-4, "
    "float? clip=None, bool unbiased=True) -> Tensor";

inline cpu::AdvantageScale advantage_scale(const std::string& name) {
  if (name == "group") return cpu::AdvantageScale::kGroup;
  if (name == "batch") return cpu::AdvantageScale::kBatch;
  if (name == "none") return cpu::AdvantageScale::kNone;
  fail("group_advantage: scale must be 'group', 'batch' or 'none', got '", name, "'");
}

inline bool leave_one_out(const std::string& baseline) {
  if (baseline == "leave_one_out") return true;
  if (baseline == "mean") return false;
  fail("group_advantage: baseline must be 'mean' or 'leave_one_out', got '", baseline, "'");
}

// Checks everything but the values of ids, and fills in what the kernels of all devices have in
// common: options, sizes and strides, not pointers. With group_ids, group_size stays 0. `Arguments`
// is cpu::GroupAdvantage or cuda::GroupAdvantage.
template <typename Arguments>
Arguments group_advantage_arguments(const torch::stable::Tensor& rewards,
                                    const std::optional<torch::stable::Tensor>& group_ids,
                                    const std::optional<torch::stable::Tensor>& mask,
                                    std::optional<int64_t> group_size, const std::string& scale,
                                    const std::string& baseline, double eps,
                                    std::optional<double> clip, bool unbiased) {
  using torch::headeronly::ScalarType;
  RLIR_CHECK(rewards.dim() == 1 || rewards.dim() == 2,
             "group_advantage: rewards must be [groups, members] or [rows], got ", rewards.dim(),
             " dimensions");
  RLIR_CHECK(std::isfinite(eps) && eps >= 0.0, "group_advantage: eps must be finite and >= 0, got ",
             eps);
  RLIR_CHECK(!clip || *clip > 0.0, "group_advantage: clip must be > 0, got ", *clip);
  if (mask) {
    RLIR_CHECK(mask->device() == rewards.device(),
               "group_advantage: mask must be on the device of rewards, got another device");
    RLIR_CHECK(mask->scalar_type() == ScalarType::Bool,
               "group_advantage: mask must be bool, got dtype ",
               static_cast<int>(mask->scalar_type()));
    bool same = mask->dim() == rewards.dim();
    for (int64_t d = 0; same && d < rewards.dim(); ++d) same = mask->size(d) == rewards.size(d);
    RLIR_CHECK(same, "group_advantage: mask must have the shape of rewards, got another shape");
  }
  const int64_t n = rewards.numel();

  Arguments args{};
  args.dtype = float_dtype("group_advantage: rewards", rewards);
  args.scale = advantage_scale(scale);
  args.leave_one_out = leave_one_out(baseline);
  args.unbiased = unbiased;
  args.eps = eps;
  args.clip = clip.value_or(std::numeric_limits<double>::infinity());
  const int64_t last = rewards.dim() - 1;
  args.reward_stride = rewards.stride(last);
  args.mask_stride = mask ? mask->stride(last) : 0;
  if (rewards.dim() == 2) {
    RLIR_CHECK(!group_ids && !group_size,
               "group_advantage: rewards [groups, members] must come without group_ids and "
               "group_size, got one of them");
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
    args.group_size = *group_size;
    args.reward_group_stride = *group_size * args.reward_stride;
    args.mask_group_stride = *group_size * args.mask_stride;
  } else {
    RLIR_CHECK(group_ids,
               "group_advantage: rewards [rows] must come with group_ids or "
               "group_size, got neither");
    RLIR_CHECK(group_ids->device() == rewards.device(),
               "group_advantage: group_ids must be on the device of rewards, got another device");
    RLIR_CHECK(group_ids->scalar_type() == ScalarType::Long,
               "group_advantage: group_ids must be int64, got dtype ",
               static_cast<int>(group_ids->scalar_type()));
    RLIR_CHECK(group_ids->dim() == 1 && group_ids->size(0) == n,
               "group_advantage: group_ids must have shape (", n, ",), got another shape");
  }
  return args;
}

}  // namespace rlir
