// The ops of selected_logprob (csrc/cpu/selected_logprob.h): schemas and checks, for every device,
// of all but values.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cmath>
#include <optional>

#include "core/check.h"
#include "core/matrix.h"

namespace rlir {

inline constexpr const char* kSelectedLogprobSchema =
    "selected_logprob(Tensor hidden, Tensor weight, Tensor targets, Tensor? bias=None, "
    "Tensor? support=None, *, float temperature=1.0, SymInt low=0, SymInt? high=None, "
    "bool compute_entropy=True) -> (Tensor, Tensor, Tensor)";
inline constexpr const char* kHeadLogitsSchema =
    "head_logits(Tensor hidden, Tensor weight, Tensor? bias=None) -> Tensor";
inline constexpr const char* kSelectedSupportSchema =
    "selected_support(Tensor hidden, Tensor weight, Tensor? bias=None, *, "
    "float temperature=1.0, SymInt? top_k=None, float? top_p=None, SymInt low=0, "
    "SymInt? high=None) -> Tensor";
inline constexpr const char* kSelectedLogprobBackwardSchema =
    "selected_logprob_backward(Tensor? grad_logprob, Tensor? grad_entropy, Tensor hidden, "
    "Tensor weight, Tensor targets, Tensor? bias, Tensor? support, Tensor entropy, "
    "Tensor stats, *, float temperature, SymInt low, SymInt? high, bool need_hidden, "
    "bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor)";

struct HeadShape {
  int64_t rows, depth, tokens, low, high;
  float temperature;
};

inline void check_head_device(const char* op, const char* name, const torch::stable::Tensor& x,
                              const torch::stable::Tensor& hidden) {
  RLIR_CHECK(x.device() == hidden.device(), op, ": ", name,
             " must be on the device of hidden, got another device");
}

inline Dtype head_dtype(const char* op, const char* name, const torch::stable::Tensor& x) {
  using torch::headeronly::ScalarType;
  const ScalarType dtype = x.scalar_type();
  RLIR_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, op, ": ", name,
             " must be float32 or bfloat16, got dtype ", static_cast<int>(dtype));
  return dtype == ScalarType::Float ? Dtype::kFloat32 : Dtype::kBFloat16;
}

inline Matrix head_matrix(const char* op, const char* name, const torch::stable::Tensor& x,
                          const torch::stable::Tensor& hidden) {
  check_head_device(op, name, x, hidden);
  RLIR_CHECK(x.dim() == 2, op, ": ", name, " must have 2 dimensions, got ", x.dim());
  return {x.const_data_ptr(), head_dtype(op, name, x), x.stride(0), x.stride(1)};
}

inline HeadShape head_shape(const char* op, const torch::stable::Tensor& hidden,
                            const torch::stable::Tensor& weight,
                            const std::optional<torch::stable::Tensor>& bias, double temperature,
                            int64_t low, std::optional<int64_t> high) {
  head_matrix(op, "hidden", hidden, hidden);
  head_matrix(op, "weight", weight, hidden);
  const HeadShape s = {hidden.size(0),
                       hidden.size(1),
                       weight.size(0),
                       low,
                       high.value_or(weight.size(0)),
                       static_cast<float>(temperature)};
  RLIR_CHECK(weight.size(1) == s.depth, op, ": weight must be [V, ", s.depth, "], got [", s.tokens,
             ", ", weight.size(1), "]");
  RLIR_CHECK(0 <= s.low && s.low < s.high && s.high <= s.tokens, op,
             ": vocab_range must satisfy 0 <= low < high <= ", s.tokens, ", got (", s.low, ", ",
             s.high, ")");
  RLIR_CHECK(std::isfinite(s.temperature) && s.temperature > 0, op,
             ": temperature must be finite and > 0, got ", temperature);
  if (bias) {
    check_head_device(op, "bias", *bias, hidden);
    head_dtype(op, "bias", *bias);
    RLIR_CHECK(bias->dim() == 1 && bias->size(0) == s.tokens, op, ": bias must be [", s.tokens,
               "], got ", bias->numel(), " elements");
  }
  return s;
}

inline void check_head_targets(const torch::stable::Tensor& targets,
                               const torch::stable::Tensor& hidden) {
  check_head_device("selected_logprob", "targets", targets, hidden);
  RLIR_CHECK(targets.scalar_type() == torch::headeronly::ScalarType::Long,
             "selected_logprob: targets must be int64, got dtype ",
             static_cast<int>(targets.scalar_type()));
  RLIR_CHECK(targets.dim() == 1 && targets.size(0) == hidden.size(0),
             "selected_logprob: targets must be [", hidden.size(0), "], got ", targets.numel(),
             " elements");
}

inline void check_head_support(const torch::stable::Tensor& support,
                               const torch::stable::Tensor& hidden, int64_t tokens) {
  check_head_device("selected_logprob", "support", support, hidden);
  RLIR_CHECK(support.scalar_type() == torch::headeronly::ScalarType::Byte,
             "selected_logprob: support must be uint8, got dtype ",
             static_cast<int>(support.scalar_type()));
  const int64_t bytes = (tokens + 7) / 8;
  RLIR_CHECK(support.dim() == 2 && support.size(0) == hidden.size(0) && support.size(1) == bytes,
             "selected_logprob: support must be [", hidden.size(0), ", ", bytes, "], got ",
             support.numel(), " elements");
  RLIR_CHECK(support.stride(1) == 1 || bytes == 1,
             "selected_logprob: support must be contiguous along V, got stride ",
             support.stride(1));
}

inline void check_truncation(std::optional<int64_t> top_k, std::optional<double> top_p,
                             int64_t tokens) {
  RLIR_CHECK(!top_k || *top_k >= 1, "selected_logprob: top_k must be >= 1, got ", *top_k);
  RLIR_CHECK(!top_p || (*top_p > 0 && *top_p <= 1),
             "selected_logprob: top_p must be in (0, 1], got ", *top_p);
  constexpr int64_t kMaxTokens = int64_t{1} << 21;  // cpu/truncation.h: sums stay exact
  RLIR_CHECK(tokens <= kMaxTokens, "selected_logprob: V with top_k or top_p must be at most ",
             kMaxTokens, ", got ", tokens);
}

// What the backward pass gets from the forward pass and from autograd.
inline void check_head_gradient(const char* name, const std::optional<torch::stable::Tensor>& grad,
                                const torch::stable::Tensor& hidden) {
  RLIR_CHECK(!grad || (grad->device() == hidden.device() &&
                       grad->scalar_type() == torch::headeronly::ScalarType::Float &&
                       grad->dim() == 1 && grad->size(0) == hidden.size(0)),
             "selected_logprob_backward: ", name, " must be float32 [", hidden.size(0),
             "], got other");
}

inline void check_head_saved(const torch::stable::Tensor& stats,
                             const torch::stable::Tensor& entropy, bool needs_entropy,
                             const torch::stable::Tensor& hidden) {
  using torch::headeronly::ScalarType;
  const int64_t n = hidden.size(0);
  RLIR_CHECK(stats.device() == hidden.device() && stats.is_contiguous() && stats.dim() == 2 &&
                 stats.size(0) == 3 && stats.size(1) == n &&
                 stats.scalar_type() == ScalarType::Float,
             "selected_logprob_backward: stats must be what selected_logprob returned, got other");
  RLIR_CHECK(
      !needs_entropy ||
          (entropy.device() == hidden.device() && entropy.is_contiguous() && entropy.dim() == 1 &&
           entropy.size(0) == n && entropy.scalar_type() == ScalarType::Float),
      "selected_logprob_backward: entropy must be what selected_logprob returned, got other");
}

}  // namespace rlir
