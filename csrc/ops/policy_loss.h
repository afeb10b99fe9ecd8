// rlir::policy_loss and its backward: schemas and checks, for every device. Formula:
// cpu/policy_loss.h.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cmath>
#include <limits>
#include <optional>
#include <string>

#include "core/check.h"
#include "cpu/policy_loss.h"
#include "ops/float_dtype.h"

namespace rlir {

inline constexpr const char* kPolicyLossSchema =
    "policy_loss(Tensor logprob, Tensor old_logprob, Tensor advantages, "
    "Tensor? ref_logprob=None, Tensor? mask=None, Tensor? rollout_logprob=None, "
    "Tensor? normalizer=None, *, str loss_type='grpo', str importance_level='token', "
    "float clip_low=0.2, float clip_high=0.2, float? delta=None, float kl_weight=0.0, "
    "str kl_estimator='k3', bool kl_importance=False, float? truncated_importance=None, float? "
    "divisor=None, "
    "SymInt? max_length=None) -> (Tensor, Tensor, Tensor)";
inline constexpr const char* kPolicyLossBackwardSchema =
    "policy_loss_backward(Tensor grad, Tensor scales, Tensor logprob, Tensor old_logprob, "
    "Tensor advantages, Tensor? ref_logprob=None, Tensor? mask=None, "
    "Tensor? rollout_logprob=None, *, str loss_type='grpo', str importance_level='token', "
    "float clip_low=0.2, float clip_high=0.2, float? delta=None, float kl_weight=0.0, "
    "str kl_estimator='k3', bool kl_importance=False, float? truncated_importance=None) -> "
    "Tensor";

inline void policy_check_shape(const char* name, const torch::stable::Tensor& x,
                               const torch::stable::Tensor& logprob) {
  RLIR_CHECK(x.device() == logprob.device(), "policy_loss: ", name,
             " must be on the device of logprob, got another device");
  RLIR_CHECK(x.dim() == 2 && x.size(0) == logprob.size(0) && x.size(1) == logprob.size(1),
             "policy_loss: ", name, " must have the shape of logprob, (", logprob.size(0), ", ",
             logprob.size(1), "), got another shape");
}

inline cpu::PolicyLoss::Matrix policy_matrix(const char* name, const torch::stable::Tensor& x,
                                             const torch::stable::Tensor& logprob) {
  policy_check_shape(name, x, logprob);
  return {x.const_data_ptr(), float_dtype(("policy_loss: " + std::string(name)).c_str(), x),
          x.stride(0), x.stride(1)};
}

inline cpu::PolicyLoss::Matrix policy_advantages(const torch::stable::Tensor& x,
                                                 const torch::stable::Tensor& logprob) {
  if (x.dim() == 2 && x.size(1) != 1) return policy_matrix("advantages", x, logprob);
  RLIR_CHECK(x.device() == logprob.device(),
             "policy_loss: advantages must be on the device of logprob, got another device");
  RLIR_CHECK((x.dim() == 1 || x.dim() == 2) && x.size(0) == logprob.size(0),
             "policy_loss: advantages must have the shape (", logprob.size(0), ",) or (",
             logprob.size(0), ", ", logprob.size(1), "), got another shape");
  return {x.const_data_ptr(), float_dtype("policy_loss: advantages", x), x.stride(0), 0};
}

inline cpu::KlEstimator kl_estimator_of(const std::string& name) {
  if (name == "k1") return cpu::KlEstimator::kK1;
  if (name == "k2") return cpu::KlEstimator::kK2;
  if (name == "k3") return cpu::KlEstimator::kK3;
  fail("policy_loss: kl_estimator must be 'k1', 'k2' or 'k3', got '", name, "'");
}

inline cpu::PolicyLossDivision policy_division(const std::string& name) {
  if (name == "grpo") return cpu::PolicyLossDivision::kRowMean;
  if (name == "bnpo") return cpu::PolicyLossDivision::kTokenMean;
  if (name == "dr_grpo") return cpu::PolicyLossDivision::kLength;
  if (name == "dapo" || name == "cispo") return cpu::PolicyLossDivision::kNormalizer;
  fail("policy_loss: loss_type must be 'grpo', 'dr_grpo', 'bnpo', 'dapo' or 'cispo', got '", name,
       "'");
}

inline cpu::PolicyLoss policy_arguments(
    const torch::stable::Tensor& logprob, const torch::stable::Tensor& old_logprob,
    const torch::stable::Tensor& advantages,
    const std::optional<torch::stable::Tensor>& ref_logprob,
    const std::optional<torch::stable::Tensor>& mask,
    const std::optional<torch::stable::Tensor>& rollout_logprob, const std::string& loss_type,
    const std::string& importance_level, double clip_low, double clip_high,
    std::optional<double> delta, double kl_weight, const std::string& kl_estimator,
    bool kl_importance, std::optional<double> truncated_importance) {
  RLIR_CHECK(logprob.dim() == 2, "policy_loss: logprob must be [B, T], got ", logprob.dim(),
             " dimensions");
  constexpr double infinity = std::numeric_limits<double>::infinity();
  cpu::PolicyLoss args{};
  args.rows = logprob.size(0);
  args.columns = logprob.size(1);
  args.logprob = policy_matrix("logprob", logprob, logprob);
  args.old_logprob = policy_matrix("old_logprob", old_logprob, logprob);
  args.advantages = policy_advantages(advantages, logprob);
  if (ref_logprob) args.ref_logprob = policy_matrix("ref_logprob", *ref_logprob, logprob);
  if (rollout_logprob) {
    args.rollout_logprob = policy_matrix("rollout_logprob", *rollout_logprob, logprob);
  }
  if (mask) {
    policy_check_shape("mask", *mask, logprob);
    RLIR_CHECK(mask->scalar_type() == torch::headeronly::ScalarType::Bool,
               "policy_loss: mask must be bool, got dtype ", static_cast<int>(mask->scalar_type()));
    args.mask = mask->const_data_ptr<bool>();
    args.mask_row_stride = mask->stride(0);
    args.mask_stride = mask->stride(1);
  }
  for (const auto* m : {&args.logprob, &args.old_logprob, &args.advantages, &args.ref_logprob,
                        &args.rollout_logprob}) {
    args.float64 = args.float64 || (m->data != nullptr && m->dtype == Dtype::kFloat64);
  }
  args.division = policy_division(loss_type);
  args.cispo = loss_type == "cispo";
  args.sequence = importance_level == "sequence";
  RLIR_CHECK(args.sequence || importance_level == "token",
             "policy_loss: importance_level must be 'token' or 'sequence', got '", importance_level,
             "'");
  args.kl = kl_estimator_of(kl_estimator);
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
  args.low = args.cispo ? -infinity : 1.0 - clip_low;
  args.high = args.cispo ? clip_high : 1.0 + clip_high;
  args.delta = args.cispo ? infinity : delta.value_or(infinity);
  args.kl_weight = kl_weight;
  args.truncated = truncated_importance.value_or(infinity);
  return args;
}

// What the loss is divided by, if it was given as a number; otherwise 0.
inline double policy_divisor(const cpu::PolicyLoss& args, std::optional<double> divisor,
                             std::optional<int64_t> max_length) {
  RLIR_CHECK(!max_length || *max_length >= 1, "policy_loss: max_length must be >= 1, got ",
             *max_length);
  RLIR_CHECK(!divisor || *divisor > 0.0, "policy_loss: normalizer must be > 0, got ", *divisor);
  const bool by_length = args.division == cpu::PolicyLossDivision::kLength;
  return by_length ? static_cast<double>(max_length.value_or(0)) : divisor.value_or(0.0);
}

inline void check_policy_scales(const torch::stable::Tensor& scales, const cpu::PolicyLoss& args,
                                const torch::stable::Tensor& logprob) {
  RLIR_CHECK(scales.device() == logprob.device() &&
                 scales.scalar_type() == torch::headeronly::ScalarType::Double &&
                 scales.dim() == 2 && scales.size(0) == 3 && scales.size(1) == args.rows &&
                 scales.is_contiguous(),
             "policy_loss: scales must be those of the forward pass, got others");
}

inline void check_policy_number(const char* name, const torch::stable::Tensor& x,
                                const torch::stable::Tensor& logprob) {
  RLIR_CHECK(x.device() == logprob.device(), "policy_loss: ", name,
             " must be on the device of logprob, got another device");
  RLIR_CHECK(x.numel() == 1, "policy_loss: ", name, " must be a number, got ", x.numel());
}

}  // namespace rlir
