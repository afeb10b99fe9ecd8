// rlir::sample_tokens: schema, checks and CPU dispatch. Formula: cpu/sample_tokens.h.
#include "cpu/sample_tokens.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <optional>
#include <tuple>

#include "core/check.h"
#include "core/cpu_isa.h"
#include "core/scratch.h"

namespace rlir {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kMaxTokens = int64_t{1} << 21;        // cpu/truncation.h: sums stay exact
constexpr int64_t kTokensPerThread = int64_t{1} << 14;  // two rows of 8192: about 15 us

void check_like(const char* name, const Tensor& x, int64_t n) {
  RLIR_CHECK(x.is_cpu(), "sample_tokens: ", name, " must be on the CPU, got another device");
  RLIR_CHECK(x.scalar_type() == ScalarType::Long, "sample_tokens: ", name,
             " must be int64, got dtype ", static_cast<int>(x.scalar_type()));
  RLIR_CHECK(n < 0 ? x.numel() == 1 : x.dim() == 1 && x.size(0) == n, "sample_tokens: ", name,
             " must have ", n < 0 ? 1 : n, " elements, got ", x.numel());
}

uint64_t number(const char* name, const std::optional<Tensor>& tensor, int64_t value) {
  if (!tensor) return static_cast<uint64_t>(value);
  check_like(name, *tensor, -1);
  return static_cast<uint64_t>(*tensor->const_data_ptr<int64_t>());
}

std::tuple<Tensor, Tensor, Tensor, Tensor> sample_tokens_cpu(
    const Tensor& logits, const std::optional<Tensor>& row_ids,
    const std::optional<Tensor>& seed_tensor, const std::optional<Tensor>& offset_tensor,
    int64_t seed, int64_t offset, double temperature, std::optional<int64_t> top_k,
    std::optional<double> top_p, std::optional<double> min_p, int64_t low,
    std::optional<int64_t> high, bool return_support) {
  RLIR_CHECK(logits.dim() == 2, "sample_tokens: logits must be [N, V], got ", logits.dim(),
             " dimensions");
  const ScalarType dtype = logits.scalar_type();
  RLIR_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16,
             "sample_tokens: logits must be float32 or bfloat16, got dtype ",
             static_cast<int>(dtype));
  const int64_t n = logits.size(0), v = logits.size(1), last = high.value_or(v);
  RLIR_CHECK(v <= kMaxTokens, "sample_tokens: V must be at most ", kMaxTokens, ", got ", v);
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
  if (row_ids) check_like("row_ids", *row_ids, n);

  cpu::SampleTokens args{};
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
  const uint64_t key = number("seed", seed_tensor, seed);
  args.key = {static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32)};
  const uint64_t count = number("offset", offset_tensor, offset);
  RLIR_CHECK(count >> 32 == 0, "sample_tokens: offset must be from 0 and below 2^32, got ", count);
  args.offset = static_cast<uint32_t>(count);
  args.row_id_stride = row_ids ? row_ids->stride(0) : 0;

  Tensor token = torch::stable::new_empty(logits, {n}, ScalarType::Long);
  Tensor logprob = torch::stable::new_empty(logits, {n}, ScalarType::Float);
  Tensor entropy = torch::stable::new_empty(logits, {n}, ScalarType::Float);
  Tensor support =
      torch::stable::new_empty(logits, {return_support ? n : 0, (v + 7) / 8}, ScalarType::Byte);
  if (n == 0) return {token, logprob, entropy, support};
  args.logits = logits.const_data_ptr();
  args.row_ids = row_ids ? row_ids->const_data_ptr<int64_t>() : nullptr;
  args.token = token.mutable_data_ptr<int64_t>();
  args.logprob = logprob.mutable_data_ptr<float>();
  args.entropy = entropy.mutable_data_ptr<float>();
  args.support = return_support ? support.mutable_data_ptr<uint8_t>() : nullptr;

  const auto kernel = RLIR_CPU_KERNEL(sample_tokens);
  const int64_t bytes = RLIR_CPU_KERNEL(sample_tokens_scratch)(v);
  const int64_t grain = std::max<int64_t>(1, kTokensPerThread / (last - low));
  std::atomic<int64_t> bad{n};
  torch::stable::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) {
    const Scratch scratch(bytes);
    const int64_t row = kernel(args, begin, end, scratch.get());
    for (int64_t now = bad; row >= 0 && row < now && !bad.compare_exchange_weak(now, row);) {
    }
  });
  RLIR_CHECK(bad == n,
             "sample_tokens: logits must have a finite largest value in vocab_range and no NaN, "
             "got otherwise in row ",
             bad.load());
  return {token, logprob, entropy, support};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(rlir, m) {
  m.def(
      "sample_tokens(Tensor logits, Tensor? row_ids=None, Tensor? seed_tensor=None, "
      "Tensor? offset_tensor=None, *, SymInt seed=0, SymInt offset=0, float temperature=1.0, "
      "SymInt? top_k=None, float? top_p=None, float? min_p=None, SymInt low=0, "
      "SymInt? high=None, bool return_support=False) -> (Tensor, Tensor, Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
}

STABLE_TORCH_LIBRARY_IMPL(rlir, CPU, m) { m.impl("sample_tokens", TORCH_BOX(&sample_tokens_cpu)); }

}  // namespace rlir
