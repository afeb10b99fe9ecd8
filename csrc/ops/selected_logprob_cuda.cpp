// rlir::selected_logprob, rlir::head_logits and rlir::selected_support on CUDA. Nothing here waits
// for the device, and all memory comes from torch's allocator: a call can be captured in a CUDA
// graph.
#include "cuda/selected_logprob.cuh"

#include <algorithm>
#include <limits>
#include <tuple>

#include "cuda/sample_tokens.cuh"
#include "ops/head_cuda.h"

namespace rlir {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kBlock = 256;  // columns
// What selected_support may have of logits at a time.
constexpr int64_t kLogitBytes = int64_t{1} << 25;
constexpr int64_t kRowStep = 128;  // whole tiles

void check_grid(const char* op, int64_t tokens) {
  RLIR_CHECK(tokens <= kBlock * 65535, op, ": V must be at most ", kBlock * 65535, ", got ",
             tokens);
}

float* scratch(CudaCall& call, std::vector<Tensor>& kept, const Tensor& like, const char* name,
               std::initializer_list<int64_t> sizes) {
  kept.push_back(torch::stable::new_empty(like, sizes, ScalarType::Float));
  return static_cast<float*>(call.out(kept.back(), name));
}

std::tuple<Tensor, Tensor, Tensor> selected_logprob_cuda(
    const Tensor& hidden, const Tensor& weight, const Tensor& targets,
    const std::optional<Tensor>& bias, const std::optional<Tensor>& support, double temperature,
    int64_t low, std::optional<int64_t> high, bool compute_entropy) {
  const HeadShape shape =
      head_shape("selected_logprob", hidden, weight, bias, temperature, low, high);
  check_head_targets(targets, hidden);
  if (support) check_head_support(*support, hidden, shape.tokens);
  check_grid("selected_logprob", shape.tokens);
  const int64_t n = shape.rows;
  CudaCall call("selected_logprob", hidden);
  Tensor logprob = torch::stable::new_empty(hidden, {n}, ScalarType::Float);
  Tensor entropy = torch::stable::new_empty(hidden, {compute_entropy ? n : 0}, ScalarType::Float);
  Tensor stats = torch::stable::new_empty(hidden, {3, n}, ScalarType::Float);
  if (n == 0) return {logprob, entropy, stats};
  CudaHead in = cuda_head(call, "selected_logprob", hidden, weight, bias, shape);
  add_cuda_targets(call, in.head, targets, support);
  cuda::SelectedLogprob args{};
  args.head = in.head;
  const int64_t blocks = (shape.high - 1) / kBlock - shape.low / kBlock + 1;
  args.block_max = scratch(call, in.copies, hidden, "block maxima", {blocks, n});
  args.block_sum = scratch(call, in.copies, hidden, "block sums", {blocks, n});
  args.block_dot = scratch(call, in.copies, hidden, "block entropy sums", {blocks, n});
  args.target_z = scratch(call, in.copies, hidden, "z of targets", {n});
  args.logprob = static_cast<float*>(call.out(logprob, "logprob"));
  args.entropy = compute_entropy ? static_cast<float*>(call.out(entropy, "entropy")) : nullptr;
  args.stats = static_cast<float*>(call.out(stats, "stats"));
  call.check(cuda::selected_logprob(args, call.stream()));
  return {logprob, entropy, stats};
}

Tensor head_logits_cuda(const Tensor& hidden, const Tensor& weight,
                        const std::optional<Tensor>& bias) {
  const HeadShape shape = head_shape("head_logits", hidden, weight, bias, 1.0, 0, std::nullopt);
  check_grid("head_logits", shape.tokens);
  CudaCall call("head_logits", hidden);
  Tensor logits = torch::stable::new_empty(hidden, {shape.rows, shape.tokens}, ScalarType::Float);
  if (shape.rows == 0) return logits;
  const CudaHead in = cuda_head(call, "head_logits", hidden, weight, bias, shape);
  float* out = static_cast<float*>(call.out(logits, "logits"));
  call.check(cuda::head_logits(in.head, out, call.stream()));
  return logits;
}

// Some rows at a time: their logits, and of these what sample_tokens would draw from.
Tensor selected_support_cuda(const Tensor& hidden, const Tensor& weight,
                             const std::optional<Tensor>& bias, double temperature,
                             std::optional<int64_t> top_k, std::optional<double> top_p, int64_t low,
                             std::optional<int64_t> high) {
  const HeadShape shape =
      head_shape("selected_logprob", hidden, weight, bias, temperature, low, high);
  check_truncation(top_k, top_p, shape.tokens);
  const int64_t n = shape.rows, v = shape.tokens, bytes = (v + 7) / 8;
  CudaCall call("selected_logprob", hidden);
  Tensor support = torch::stable::new_empty(hidden, {n, bytes}, ScalarType::Byte);
  if (n == 0) return support;
  uint8_t* out = static_cast<uint8_t*>(call.out(support, "support"));
  CudaHead in = cuda_head(call, "selected_logprob", hidden, weight, bias, shape);
  const int64_t fit = kLogitBytes / (4 * v) / kRowStep * kRowStep;
  const int64_t step = std::min(std::max(fit, kRowStep), n);
  float* logits = scratch(call, in.copies, hidden, "logits", {step, v});
  cuda::SampleTokens args{};
  args.logits = logits;
  args.dtype = Dtype::kFloat32;
  args.row_stride = v;
  args.token_stride = 1;
  args.tokens = v;
  args.low = shape.low;
  args.high = shape.high;
  args.temperature = shape.temperature;
  args.top_k = top_k.value_or(0);
  args.top_p = top_p.value_or(1.0);
  args.support_only = true;
  if (const int64_t space = cuda::sample_tokens_space(shape.low, shape.high); space > 0) {
    in.copies.push_back(torch::stable::new_empty(hidden, {step, space}, ScalarType::Byte));
    args.space = call.out(in.copies.back(), "workspace");
  }
  for (int64_t first = 0; first < n; first += step) {
    cuda::Head head = in.head;
    const int64_t size = head.hidden.dtype == Dtype::kFloat32 ? 4 : 2;
    head.hidden.data =
        static_cast<const char*>(head.hidden.data) + first * head.hidden.major_stride * size;
    head.rows = args.rows = std::min(step, n - first);
    args.support = out + first * bytes;
    call.check(cuda::head_logits(head, logits, call.stream()));
    call.check(cuda::sample_tokens(args, call.stream()));
  }
  return support;
}

}  // namespace

RLIR_CUDA_OP("selected_logprob", kSelectedLogprobSchema, &selected_logprob_cuda)
RLIR_CUDA_OP("head_logits", kHeadLogitsSchema, &head_logits_cuda)
RLIR_CUDA_OP("selected_support", kSelectedSupportSchema, &selected_support_cuda)

}  // namespace rlir
