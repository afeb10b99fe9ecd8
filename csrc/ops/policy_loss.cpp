// rlir::policy_loss and its backward: CPU dispatch, and what makes a loss and statistics of the
// rows' sums. Formula: cpu/policy_loss.h.
#include "ops/policy_loss.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <array>
#include <bit>
#include <tuple>
#include <vector>

#include "core/cpu_isa.h"
#include "cpu/policy_loss_totals.h"

namespace rlir {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Tokens a thread should at least have: below, starting threads costs more than they save.
constexpr int64_t kTokensPerThread = 1 << 14;

double scalar_of(const char* name, const Tensor& x, const Tensor& logprob) {
  check_policy_number(name, x, logprob);
  switch (x.scalar_type()) {
    case ScalarType::Long:
      return static_cast<double>(*x.const_data_ptr<int64_t>());
    case ScalarType::Int:
      return static_cast<double>(*x.const_data_ptr<int32_t>());
    case ScalarType::Double:
      return *x.const_data_ptr<double>();
    case ScalarType::Float:
      return *x.const_data_ptr<float>();
    case ScalarType::BFloat16:
      return load(static_cast<const BFloat16*>(x.const_data_ptr()));
    case ScalarType::Half:
      return load(static_cast<const Float16*>(x.const_data_ptr()));
    default:
      fail("policy_loss: ", name, " must be an int or a float, got dtype ",
           static_cast<int>(x.scalar_type()));
  }
}

Tensor new_like(const Tensor& logprob, bool float64, std::initializer_list<int64_t> sizes) {
  const ScalarType dtype = float64 ? ScalarType::Double : ScalarType::Float;
  return torch::stable::new_empty(logprob, sizes, dtype);
}

void set(const Tensor& x, int64_t i, double value) {
  if (x.scalar_type() == ScalarType::Double) {
    static_cast<double*>(x.mutable_data_ptr())[i] = value;
  } else {
    static_cast<float*>(x.mutable_data_ptr())[i] = static_cast<float>(value);
  }
}

// By one thread: the sums do not depend on the number of threads.
void add_rows(const std::vector<cpu::PolicyLossRow>& rows, double (&total)[cpu::kRowValues]) {
  for (int value = 0; value < cpu::kRowValues; ++value) total[value] = cpu::first_total(value);
  for (const cpu::PolicyLossRow& row : rows) {
    if (row.tokens == 0.0) continue;
    const auto own = std::bit_cast<std::array<double, cpu::kRowValues>>(row);
    for (int value = 0; value < cpu::kRowValues; ++value) {
      total[value] = cpu::join_total(value, total[value], own[value]);
    }
  }
}

int64_t grain_of(const cpu::PolicyLoss& args) {
  return std::max<int64_t>(1, kTokensPerThread / std::max<int64_t>(1, args.columns));
}

std::tuple<Tensor, Tensor, Tensor> policy_loss_cpu(
    const Tensor& logprob, const Tensor& old_logprob, const Tensor& advantages,
    const std::optional<Tensor>& ref_logprob, const std::optional<Tensor>& mask,
    const std::optional<Tensor>& rollout_logprob, const std::optional<Tensor>& normalizer,
    std::string loss_type, std::string importance_level, double clip_low, double clip_high,
    std::optional<double> delta, double kl_weight, std::string kl_estimator, bool kl_importance,
    std::optional<double> truncated_importance, std::optional<double> divisor,
    std::optional<int64_t> max_length) {
  const cpu::PolicyLoss args =
      policy_arguments(logprob, old_logprob, advantages, ref_logprob, mask, rollout_logprob,
                       loss_type, importance_level, clip_low, clip_high, delta, kl_weight,
                       kl_estimator, kl_importance, truncated_importance);
  double given = policy_divisor(args, divisor, max_length);
  if (normalizer) {
    const double number = scalar_of("normalizer", *normalizer, logprob);
    RLIR_CHECK(number > 0.0, "policy_loss: normalizer must be > 0, got ", number);
    if (args.division == cpu::PolicyLossDivision::kNormalizer) given = number;
  }

  std::vector<cpu::PolicyLossRow> rows(args.rows);
  const auto kernel = RLIR_CPU_KERNEL(policy_loss);
  torch::stable::parallel_for(0, args.rows, grain_of(args), [&](int64_t begin, int64_t end) {
    kernel(args, begin, end, rows.data());
  });

  Tensor loss = new_like(logprob, args.float64, {});
  Tensor statistics = new_like(logprob, args.float64, {cpu::kPolicyLossStatistics});
  Tensor scales = new_like(logprob, true, {3, args.rows});  // and slopes, ratios: for backward
  double total[cpu::kRowValues], seen[cpu::kPolicyLossStatistics];
  add_rows(rows, total);
  cpu::statistics_of(args, total, seen);
  for (int64_t i = 0; i < cpu::kPolicyLossStatistics; ++i) set(statistics, i, seen[i]);
  const double whole = cpu::common_divisor(args, total[cpu::kRowTokens], given);
  double* scale = scales.mutable_data_ptr<double>();
  for (int64_t i = 0; i < args.rows; ++i) {
    scale[i] = 1.0 / (cpu::row_divisor(args, rows[i].tokens) * whole);
    scale[args.rows + i] = rows[i].slope;
    scale[2 * args.rows + i] = rows[i].ratio;
  }
  set(loss, 0, total[cpu::kRowTerm] / whole);
  return {loss, statistics, scales};
}

Tensor policy_loss_backward_cpu(const Tensor& grad, const Tensor& scales, const Tensor& logprob,
                                const Tensor& old_logprob, const Tensor& advantages,
                                const std::optional<Tensor>& ref_logprob,
                                const std::optional<Tensor>& mask,
                                const std::optional<Tensor>& rollout_logprob, std::string loss_type,
                                std::string importance_level, double clip_low, double clip_high,
                                std::optional<double> delta, double kl_weight,
                                std::string kl_estimator, bool kl_importance,
                                std::optional<double> truncated_importance) {
  const cpu::PolicyLoss args =
      policy_arguments(logprob, old_logprob, advantages, ref_logprob, mask, rollout_logprob,
                       loss_type, importance_level, clip_low, clip_high, delta, kl_weight,
                       kl_estimator, kl_importance, truncated_importance);
  check_policy_scales(scales, args, logprob);
  const double outer = scalar_of("grad", grad, logprob);
  const double* scale = scales.const_data_ptr<double>();
  std::vector<double> all(scale, scale + args.rows);
  for (double& x : all) x *= outer;
  Tensor gradient = torch::stable::new_empty(logprob, logprob.sizes());
  void* out = gradient.mutable_data_ptr();
  const auto kernel = RLIR_CPU_KERNEL(policy_loss_backward);
  torch::stable::parallel_for(0, args.rows, grain_of(args), [&](int64_t begin, int64_t end) {
    kernel(args, begin, end, all.data(), scale + args.rows, scale + 2 * args.rows, out);
  });
  return gradient;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(rlir, m) {
  m.def(kPolicyLossSchema, {at::Tag::pt2_compliant_tag});
  m.def(kPolicyLossBackwardSchema, {at::Tag::pt2_compliant_tag});
}

STABLE_TORCH_LIBRARY_IMPL(rlir, CPU, m) {
  m.impl("policy_loss", TORCH_BOX(&policy_loss_cpu));
  m.impl("policy_loss_backward", TORCH_BOX(&policy_loss_backward_cpu));
}

}  // namespace rlir
