// rlir::policy_loss and its backward: schemas, checks, CPU dispatch, and what makes a loss and
// statistics of the rows' sums. Formula: cpu/policy_loss.h.
#include "cpu/policy_loss.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "core/check.h"
#include "core/cpu_isa.h"
#include "ops/float_dtype.h"

namespace rlir {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr double kInfinity = std::numeric_limits<double>::infinity();
// Tokens a thread should at least have: below, starting threads costs more than they save.
constexpr int64_t kTokensPerThread = 1 << 14;

// In the order of PolicyLossStatistics in Python.
enum Statistic {
  kTokens,
  kKl,
  kOldKl,
  kRatio,
  kRatioMin,
  kRatioMax,
  kEss,
  kClippedLow,
  kClippedHigh,
  kClippedDelta,
  kOutside,
  kImportance,
  kTruncated,
  kStatistics
};

enum class Reduction { kRowMean, kTokenMean, kLength, kNormalizer };

void check_shape(const char* name, const Tensor& x, const Tensor& logprob) {
  RLIR_CHECK(x.is_cpu(), "policy_loss: ", name, " must be on the CPU, got another device");
  RLIR_CHECK(x.dim() == 2 && x.size(0) == logprob.size(0) && x.size(1) == logprob.size(1),
             "policy_loss: ", name, " must have the shape of logprob, (", logprob.size(0), ", ",
             logprob.size(1), "), got another shape");
}

cpu::PolicyLoss::Matrix matrix_of(const char* name, const Tensor& x, const Tensor& logprob) {
  check_shape(name, x, logprob);
  return {x.const_data_ptr(), float_dtype(("policy_loss: " + std::string(name)).c_str(), x),
          x.stride(0), x.stride(1)};
}

cpu::PolicyLoss::Matrix advantages_of(const Tensor& x, const Tensor& logprob) {
  if (x.dim() == 2 && x.size(1) != 1) return matrix_of("advantages", x, logprob);
  RLIR_CHECK(x.is_cpu(), "policy_loss: advantages must be on the CPU, got another device");
  RLIR_CHECK((x.dim() == 1 || x.dim() == 2) && x.size(0) == logprob.size(0),
             "policy_loss: advantages must have the shape (", logprob.size(0), ",) or (",
             logprob.size(0), ", ", logprob.size(1), "), got another shape");
  return {x.const_data_ptr(), float_dtype("policy_loss: advantages", x), x.stride(0), 0};
}

cpu::KlEstimator estimator_of(const std::string& name) {
  if (name == "k1") return cpu::KlEstimator::kK1;
  if (name == "k2") return cpu::KlEstimator::kK2;
  if (name == "k3") return cpu::KlEstimator::kK3;
  fail("policy_loss: kl_estimator must be 'k1', 'k2' or 'k3', got '", name, "'");
}

Reduction reduction_of(const std::string& name) {
  if (name == "grpo") return Reduction::kRowMean;
  if (name == "bnpo") return Reduction::kTokenMean;
  if (name == "dr_grpo") return Reduction::kLength;
  if (name == "dapo" || name == "cispo") return Reduction::kNormalizer;
  fail("policy_loss: loss_type must be 'grpo', 'dr_grpo', 'bnpo', 'dapo' or 'cispo', got '", name,
       "'");
}

cpu::PolicyLoss args_of(const Tensor& logprob, const Tensor& old_logprob, const Tensor& advantages,
                        const std::optional<Tensor>& ref_logprob, const std::optional<Tensor>& mask,
                        const std::optional<Tensor>& rollout_logprob, const std::string& loss_type,
                        const std::string& importance_level, double clip_low, double clip_high,
                        std::optional<double> delta, double kl_weight,
                        const std::string& kl_estimator, bool kl_importance,
                        std::optional<double> truncated_importance) {
  RLIR_CHECK(logprob.dim() == 2, "policy_loss: logprob must be [B, T], got ", logprob.dim(),
             " dimensions");
  cpu::PolicyLoss args{};
  args.rows = logprob.size(0);
  args.columns = logprob.size(1);
  args.logprob = matrix_of("logprob", logprob, logprob);
  args.old_logprob = matrix_of("old_logprob", old_logprob, logprob);
  args.advantages = advantages_of(advantages, logprob);
  if (ref_logprob) args.ref_logprob = matrix_of("ref_logprob", *ref_logprob, logprob);
  if (rollout_logprob) {
    args.rollout_logprob = matrix_of("rollout_logprob", *rollout_logprob, logprob);
  }
  if (mask) {
    check_shape("mask", *mask, logprob);
    RLIR_CHECK(mask->scalar_type() == ScalarType::Bool,
               "policy_loss: mask must be bool, got dtype ", static_cast<int>(mask->scalar_type()));
    args.mask = mask->const_data_ptr<bool>();
    args.mask_row_stride = mask->stride(0);
    args.mask_stride = mask->stride(1);
  }
  for (const auto* m : {&args.logprob, &args.old_logprob, &args.advantages, &args.ref_logprob,
                        &args.rollout_logprob}) {
    args.float64 = args.float64 || (m->data != nullptr && m->dtype == Dtype::kFloat64);
  }
  args.cispo = loss_type == "cispo";
  args.sequence = importance_level == "sequence";
  RLIR_CHECK(args.sequence || importance_level == "token",
             "policy_loss: importance_level must be 'token' or 'sequence', got '", importance_level,
             "'");
  args.kl = estimator_of(kl_estimator);
  args.kl_importance = kl_importance;
  RLIR_CHECK(args.cispo || (clip_low >= 0.0 && clip_low <= 1.0),
             "policy_loss: clip_low must be between 0 and 1, got ", clip_low);
  RLIR_CHECK(clip_high >= 0.0, "policy_loss: clip_high must be >= 0, got ", clip_high);
  RLIR_CHECK(!delta || *delta > 0.0, "policy_loss: delta must be > 0, got ", *delta);
  RLIR_CHECK(std::isfinite(kl_weight), "policy_loss: kl_weight must be finite, got ", kl_weight);
  RLIR_CHECK(kl_weight == 0.0 || ref_logprob,
             "policy_loss: kl_weight must come with ref_logprob, got ", kl_weight, " without");
  RLIR_CHECK(rollout_logprob.has_value() == truncated_importance.has_value(),
             "policy_loss: rollout_logprob must come with truncated_importance, got one of them");
  RLIR_CHECK(!truncated_importance || *truncated_importance > 0.0,
             "policy_loss: truncated_importance must be > 0, got ", *truncated_importance);
  args.low = args.cispo ? -kInfinity : 1.0 - clip_low;
  args.high = args.cispo ? clip_high : 1.0 + clip_high;
  args.delta = args.cispo ? kInfinity : delta.value_or(kInfinity);
  args.kl_weight = kl_weight;
  args.truncated = truncated_importance.value_or(kInfinity);
  return args;
}

double scalar_of(const char* name, const Tensor& x) {
  RLIR_CHECK(x.is_cpu(), "policy_loss: ", name, " must be on the CPU, got another device");
  RLIR_CHECK(x.numel() == 1, "policy_loss: ", name, " must be a number, got ", x.numel());
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

// Rows are added in their order, by one thread: the sums do not depend on the number of threads.
void statistics_of(const std::vector<cpu::PolicyLossRow>& rows, bool sequence, const Tensor& out) {
  double sums[kStatistics] = {}, square = 0.0, present = 0.0;
  double lowest = kInfinity, highest = -kInfinity;
  for (const cpu::PolicyLossRow& r : rows) {
    if (r.tokens == 0.0) continue;
    present += 1.0;
    sums[kTokens] += r.tokens;
    sums[kKl] += r.kl;
    sums[kOldKl] -= r.log_ratio;
    sums[kRatio] += r.ratio;
    square += r.square;
    // A NaN stays.
    lowest = r.lowest >= lowest ? lowest : (lowest != lowest ? lowest : r.lowest);
    highest = r.highest <= highest ? highest : (highest != highest ? highest : r.highest);
    sums[kClippedLow] += r.clipped_low;
    sums[kClippedHigh] += r.clipped_high;
    sums[kClippedDelta] += r.clipped_delta;
    sums[kOutside] += r.outside;
    sums[kImportance] += r.weight;
    sums[kTruncated] += r.truncated;
  }
  const double tokens = std::max(sums[kTokens], 1.0);
  const double ratios = std::max(sequence ? present : sums[kTokens], 1.0);
  const double spread = square * ratios;
  sums[kEss] = spread > 0.0 && !std::isinf(spread) ? sums[kRatio] * sums[kRatio] / spread
               : spread != spread                  ? spread
                                                   : 0.0;
  for (const Statistic s : {kKl, kOldKl, kImportance, kTruncated}) sums[s] /= tokens;
  for (const Statistic s : {kRatio, kClippedLow, kClippedHigh, kClippedDelta, kOutside}) {
    sums[s] /= ratios;
  }
  sums[kRatioMin] = present > 0.0 ? lowest : 0.0;
  sums[kRatioMax] = present > 0.0 ? highest : 0.0;
  for (int64_t i = 0; i < kStatistics; ++i) set(out, i, sums[i]);
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
  const Reduction reduction = reduction_of(loss_type);
  const cpu::PolicyLoss args =
      args_of(logprob, old_logprob, advantages, ref_logprob, mask, rollout_logprob, loss_type,
              importance_level, clip_low, clip_high, delta, kl_weight, kl_estimator, kl_importance,
              truncated_importance);
  const double given = normalizer ? scalar_of("normalizer", *normalizer) : divisor.value_or(1.0);
  RLIR_CHECK(given > 0.0, "policy_loss: normalizer must be > 0, got ", given);
  RLIR_CHECK(!max_length || *max_length >= 1, "policy_loss: max_length must be >= 1, got ",
             *max_length);

  std::vector<cpu::PolicyLossRow> rows(args.rows);
  const auto kernel = RLIR_CPU_KERNEL(policy_loss);
  torch::stable::parallel_for(0, args.rows, grain_of(args), [&](int64_t begin, int64_t end) {
    kernel(args, begin, end, rows.data());
  });

  Tensor loss = new_like(logprob, args.float64, {});
  Tensor statistics = new_like(logprob, args.float64, {kStatistics});
  Tensor scales = new_like(logprob, true, {3, args.rows});  // and slopes, ratios: for backward
  double* scale = scales.mutable_data_ptr<double>();
  statistics_of(rows, args.sequence, statistics);

  double tokens = 0.0, sum = 0.0;
  for (const cpu::PolicyLossRow& r : rows) tokens += r.tokens;
  double whole = std::max(tokens, 1.0);
  const double count = static_cast<double>(std::max<int64_t>(args.rows, 1));
  if (reduction == Reduction::kRowMean) whole = count;
  if (reduction == Reduction::kLength) {
    const int64_t length = max_length.value_or(std::max<int64_t>(args.columns, 1));
    whole = count * static_cast<double>(length);
  }
  if (reduction == Reduction::kNormalizer && (normalizer || divisor)) whole = given;
  for (int64_t i = 0; i < args.rows; ++i) {
    const double own = reduction == Reduction::kRowMean ? std::max(rows[i].tokens, 1.0) : 1.0;
    sum +=
        (args.kl_weight == 0.0 ? -rows[i].gain : args.kl_weight * rows[i].kl - rows[i].gain) / own;
    scale[i] = 1.0 / (own * whole);
    scale[args.rows + i] = rows[i].slope;
    scale[2 * args.rows + i] = rows[i].ratio;
  }
  set(loss, 0, sum / whole);
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
      args_of(logprob, old_logprob, advantages, ref_logprob, mask, rollout_logprob, loss_type,
              importance_level, clip_low, clip_high, delta, kl_weight, kl_estimator, kl_importance,
              truncated_importance);
  RLIR_CHECK(scales.is_cpu() && scales.scalar_type() == ScalarType::Double && scales.dim() == 2 &&
                 scales.size(0) == 3 && scales.size(1) == args.rows && scales.is_contiguous(),
             "policy_loss: scales must be those of the forward pass, got others");
  const double outer = scalar_of("grad", grad);
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
  m.def(
      "policy_loss(Tensor logprob, Tensor old_logprob, Tensor advantages, "
      "Tensor? ref_logprob=None, Tensor? mask=None, Tensor? rollout_logprob=None, "
      "Tensor? normalizer=None, *, str loss_type='grpo', str importance_level='token', "
      "float clip_low=0.2, float clip_high=0.2, float? delta=None, float kl_weight=0.0, "
      "str kl_estimator='k3', bool kl_importance=False, float? truncated_importance=None, float? "
      "divisor=None, "
      "SymInt? max_length=None) -> (Tensor, Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "policy_loss_backward(Tensor grad, Tensor scales, Tensor logprob, Tensor old_logprob, "
      "Tensor advantages, Tensor? ref_logprob=None, Tensor? mask=None, "
      "Tensor? rollout_logprob=None, *, str loss_type='grpo', str importance_level='token', "
      "float clip_low=0.2, float clip_high=0.2, float? delta=None, float kl_weight=0.0, "
      "str kl_estimator='k3', bool kl_importance=False, float? truncated_importance=None) -> "
      "Tensor",
      {at::Tag::pt2_compliant_tag});
}

STABLE_TORCH_LIBRARY_IMPL(rlir, CPU, m) {
  m.impl("policy_loss", TORCH_BOX(&policy_loss_cpu));
  m.impl("policy_loss_backward", TORCH_BOX(&policy_loss_backward_cpu));
}

}  // namespace rlir
