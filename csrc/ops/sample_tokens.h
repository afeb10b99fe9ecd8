// rlir::sample_tokens: schema and checks, for every device. Formula: cpu/sample_tokens.h.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cmath>
#include <optional>

#include "core/check.h"
#include "core/dtype.h"

namespace rlir {

inline constexpr const char* kSampleTokensSchema =
    "sample_tokens(Tensor logits, Tensor? row_ids=None, Tensor? seed_tensor=None, "
    "Tensor? offset_tensor=None, *, SymInt seed=0, SymInt offset=0, float temperature=1.0, "
    "SymInt? top_k=None, float? top_p=None, float? min_p=None, SymInt low=0, "
    "SymInt? high=None, bool return_support=False) -> (Tensor, Tensor, Tensor, Tensor)";

inline constexpr int64_t kMaxVocabulary = int64_t{1} << 21;  // sums of masses stay exact

// `n` elements, or one if n < 0.
inline void check_draw(const char* name, const torch::stable::Tensor& x,
                       const torch::stable::Tensor& logits, int64_t n) {
  RLIR_CHECK(x.device() == logits.device(), "sample_tokens: ", name,
             " must be on the device of logits, got another device");
  RLIR_CHECK(x.scalar_type() == torch::headeronly::ScalarType::Long, "sample_tokens: ", name,
             " must be int64, got dtype ", static_cast<int>(x.scalar_type()));
  RLIR_CHECK(n < 0 ? x.numel() == 1 : x.dim() == 1 && x.size(0) == n, "sample_tokens: ", name,
             " must have ", n < 0 ? 1 : n, " elements, got ", x.numel());
}

// Checks everything but seed, offset and the values of logits, and fills in what the kernels of all
// devices have in common, but pointers. `Arguments`: cpu::SampleTokens or cuda::SampleTokens.
template <typename Arguments>
Arguments sample_arguments(const torch::stable::Tensor& logits,
                           const std::optional<torch::stable::Tensor>& row_ids, double temperature,
                           std::optional<int64_t> top_k, std::optional<double> top_p,
                           std::optional<double> min_p, int64_t low, std::optional<int64_t> high) {
  using torch::headeronly::ScalarType;
  RLIR_CHECK(logits.dim() == 2, "sample_tokens: logits must be [N, V], got ", logits.dim(),
             " dimensions");
  const ScalarType dtype = logits.scalar_type();
  RLIR_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16,
             "sample_tokens: logits must be float32 or bfloat16, got dtype ",
             static_cast<int>(dtype));
  const int64_t n = logits.size(0), v = logits.size(1), last = high.value_or(v);
  RLIR_CHECK(v <= kMaxVocabulary, "sample_tokens: V must be at most ", kMaxVocabulary, ", got ", v);
  RLIR_CHECK(0 <= low && low < last && last <= v,
             "sample_tokens: vocab_range must satisfy 0 <= low < high <= ", v, ", got (", low, ", ",
             last, ")");
  RLIR_CHECK(std::isfinite(static_cast<float>(temperature)) && static_cast<float>(temperature) > 0,
             "sample_tokens: temperature must be finite and > 0, got ", temperature);
  RLIR_CHECK(!top_k || *top_k >= 1, "sample_tokens: top_k must be >= 1, got ", *top_k);
  RLIR_CHECK(!top_p || (*top_p > 0 && *top_p <= 1), "sample_tokens: top_p must be in (0, 1], got ",
             *top_p);
  RLIR_CHECK(!min_p || (*min_p >= 0 && *min_p <= 1), "sample_tokens: min_p must be in [0, 1], got ",
             *min_p);
  if (row_ids) check_draw("row_ids", *row_ids, logits, n);

  Arguments args{};
  args.dtype = dtype == ScalarType::Float ? Dtype::kFloat32 : Dtype::kBFloat16;
  args.row_stride = logits.stride(0);
  args.token_stride = logits.stride(1);
  args.tokens = v;
  args.low = low;
  args.high = last;
  args.temperature = static_cast<float>(temperature);
  args.top_k = top_k.value_or(0);
  args.top_p = top_p.value_or(1.0);
  args.min_p = min_p.value_or(0.0);
  args.row_id_stride = row_ids ? row_ids->stride(0) : 0;
  return args;
}

}  // namespace rlir
