// rlir::sample_tokens on the CPU. Formula: cpu/sample_tokens.h.
#include "cpu/sample_tokens.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <atomic>
#include <optional>
#include <tuple>

#include "core/cpu_isa.h"
#include "core/scratch.h"
#include "ops/sample_tokens.h"

namespace rlir {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kTokensPerThread = int64_t{1} << 14;  // two rows of 8192: about 15 us

uint64_t number(const char* name, const std::optional<Tensor>& tensor, const Tensor& logits,
                int64_t value) {
  if (!tensor) return static_cast<uint64_t>(value);
  check_draw(name, *tensor, logits, -1);
  return static_cast<uint64_t>(*tensor->const_data_ptr<int64_t>());
}

std::tuple<Tensor, Tensor, Tensor, Tensor> sample_tokens_cpu(
    const Tensor& logits, const std::optional<Tensor>& row_ids,
    const std::optional<Tensor>& seed_tensor, const std::optional<Tensor>& offset_tensor,
    int64_t seed, int64_t offset, double temperature, std::optional<int64_t> top_k,
    std::optional<double> top_p, std::optional<double> min_p, int64_t low,
    std::optional<int64_t> high, bool return_support) {
  auto args = sample_arguments<cpu::SampleTokens>(logits, row_ids, temperature, top_k, top_p, min_p,
                                                  low, high);
  const int64_t n = logits.size(0), v = logits.size(1);
  const uint64_t key = number("seed", seed_tensor, logits, seed);
  args.key = {static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32)};
  const uint64_t count = number("offset", offset_tensor, logits, offset);
  RLIR_CHECK(count >> 32 == 0, "sample_tokens: offset must be from 0 and below 2^32, got ", count);
  args.offset = static_cast<uint32_t>(count);

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
  const int64_t grain = std::max<int64_t>(1, kTokensPerThread / (args.high - low));
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

STABLE_TORCH_LIBRARY_FRAGMENT(rlir, m) { m.def(kSampleTokensSchema, {at::Tag::pt2_compliant_tag}); }

STABLE_TORCH_LIBRARY_IMPL(rlir, CPU, m) { m.impl("sample_tokens", TORCH_BOX(&sample_tokens_cpu)); }

}  // namespace rlir
