// rlir::sample_tokens on CUDA. Nothing here waits for the device, and all memory comes from torch's
// allocator: a call can be captured in a CUDA graph.
#include "cuda/sample_tokens.cuh"

#include <tuple>

#include "ops/cuda_call.h"
#include "ops/sample_tokens.h"

namespace rlir {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

std::tuple<Tensor, Tensor, Tensor, Tensor> sample_tokens_cuda(
    const Tensor& logits, const std::optional<Tensor>& row_ids,
    const std::optional<Tensor>& seed_tensor, const std::optional<Tensor>& offset_tensor,
    int64_t seed, int64_t offset, double temperature, std::optional<int64_t> top_k,
    std::optional<double> top_p, std::optional<double> min_p, int64_t low,
    std::optional<int64_t> high, bool return_support) {
  auto args = sample_arguments<cuda::SampleTokens>(logits, row_ids, temperature, top_k, top_p,
                                                   min_p, low, high);
  if (seed_tensor) check_draw("seed", *seed_tensor, logits, -1);
  if (offset_tensor) check_draw("offset", *offset_tensor, logits, -1);
  RLIR_CHECK(offset_tensor || static_cast<uint64_t>(offset) >> 32 == 0,
             "sample_tokens: offset must be from 0 and below 2^32, got ", offset);
  const int64_t n = logits.size(0), v = logits.size(1);
  CudaCall call("sample_tokens", logits);
  Tensor token = torch::stable::new_empty(logits, {n}, ScalarType::Long);
  Tensor logprob = torch::stable::new_empty(logits, {n}, ScalarType::Float);
  Tensor entropy = torch::stable::new_empty(logits, {n}, ScalarType::Float);
  Tensor support =
      torch::stable::new_empty(logits, {return_support ? n : 0, (v + 7) / 8}, ScalarType::Byte);
  if (n == 0) return {token, logprob, entropy, support};
  args.rows = n;
  args.logits = call.in(logits, "logits");
  args.seed = static_cast<uint64_t>(seed);
  args.offset = static_cast<uint64_t>(offset);
  if (seed_tensor) args.seed_tensor = static_cast<const int64_t*>(call.in(*seed_tensor, "seed"));
  if (offset_tensor) {
    args.offset_tensor = static_cast<const int64_t*>(call.in(*offset_tensor, "offset"));
  }
  if (row_ids) args.row_ids = static_cast<const int64_t*>(call.in(*row_ids, "row_ids"));
  args.token = static_cast<int64_t*>(call.out(token, "token"));
  args.logprob = static_cast<float*>(call.out(logprob, "logprob"));
  args.entropy = static_cast<float*>(call.out(entropy, "entropy"));
  if (return_support) args.support = static_cast<uint8_t*>(call.out(support, "support"));
  std::optional<Tensor> space;
  if (const int64_t bytes = cuda::sample_tokens_space(args.low, args.high); bytes > 0) {
    space = torch::stable::new_empty(logits, {n, bytes}, ScalarType::Byte);
    args.space = call.out(*space, "workspace");
  }
  call.check(cuda::sample_tokens(args, call.stream()));
  return {token, logprob, entropy, support};
}

}  // namespace

RLIR_CUDA_OP("sample_tokens", kSampleTokensSchema, &sample_tokens_cuda)

}  // namespace rlir
