// rlir::selected_logprob_backward on CUDA. Nothing here waits for the device, and all memory comes
// from torch's allocator: a call can be captured in a CUDA graph.
#include <algorithm>
#include <tuple>

#include "ops/head_cuda.h"

namespace rlir {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kBlock = 256;                    // columns
constexpr int64_t kChunkBytes = int64_t{1} << 25;  // of dz, unless one block is more
constexpr int64_t kMostBlocks = 32;

const float* gradient(CudaCall& call, const char* name, const std::optional<Tensor>& grad,
                      int64_t* stride) {
  if (!grad) return nullptr;
  *stride = grad->stride(0);
  return static_cast<const float*>(call.in(*grad, name));
}

std::tuple<Tensor, Tensor, Tensor> selected_logprob_backward_cuda(
    const std::optional<Tensor>& grad_logprob, const std::optional<Tensor>& grad_entropy,
    const Tensor& hidden, const Tensor& weight, const Tensor& targets,
    const std::optional<Tensor>& bias, const std::optional<Tensor>& support, const Tensor& entropy,
    const Tensor& stats, double temperature, int64_t low, std::optional<int64_t> high,
    bool need_hidden, bool need_weight, bool need_bias) {
  const HeadShape shape =
      head_shape("selected_logprob", hidden, weight, bias, temperature, low, high);
  check_head_targets(targets, hidden);
  if (support) check_head_support(*support, hidden, shape.tokens);
  check_head_gradient("grad_logprob", grad_logprob, hidden);
  check_head_gradient("grad_entropy", grad_entropy, hidden);
  check_head_saved(stats, entropy, grad_entropy.has_value(), hidden);
  const int64_t n = shape.rows, h = shape.depth, v = shape.tokens;
  CudaCall call("selected_logprob", hidden);
  const auto part = [&](bool needed, const Tensor& like, std::initializer_list<int64_t> sizes,
                        bool whole, ScalarType dtype) {
    if (!needed) return torch::stable::new_empty(like, {0}, dtype);
    return whole ? torch::stable::new_empty(like, sizes, dtype)
                 : torch::stable::new_zeros(like, sizes, dtype);
  };
  const bool whole = shape.low == 0 && shape.high == v && n > 0;
  Tensor grad_hidden = part(need_hidden, hidden, {n, h}, true, hidden.scalar_type());
  Tensor grad_weight = part(need_weight, weight, {v, h}, whole, weight.scalar_type());
  Tensor grad_bias = part(need_bias, hidden, {v}, whole, ScalarType::Float);
  if (n == 0) return {grad_hidden, grad_weight, grad_bias};

  CudaHead in = cuda_head(call, "selected_logprob", hidden, weight, bias, shape);
  add_cuda_targets(call, in.head, targets, support);
  cuda::HeadGradient g{};
  g.head = in.head;
  g.grad_logprob = gradient(call, "grad_logprob", grad_logprob, &g.grad_logprob_stride);
  g.grad_entropy = gradient(call, "grad_entropy", grad_entropy, &g.grad_entropy_stride);
  g.stats = static_cast<const float*>(call.in(stats, "stats"));
  if (grad_entropy) g.entropy = static_cast<const float*>(call.in(entropy, "entropy"));
  g.hidden_dtype = head_dtype("selected_logprob", "hidden", hidden);
  g.weight_dtype = head_dtype("selected_logprob", "weight", weight);
  // A partly written gradient has zeros where vocab_range has no token.
  if (need_hidden) g.grad_hidden = call.out(grad_hidden, "grad_hidden");
  if (need_weight) {
    g.grad_weight =
        whole ? call.out(grad_weight, "grad_weight") : call.in_out(grad_weight, "grad_weight");
  }
  if (need_bias) {
    void* to = whole ? call.out(grad_bias, "grad_bias") : call.in_out(grad_bias, "grad_bias");
    g.grad_bias = static_cast<float*>(to);
  }

  const int64_t first = shape.low / kBlock, last = (shape.high - 1) / kBlock + 1;
  const int64_t size = in.head.tensor_cores ? 2 : 4;
  const int64_t fit = std::clamp<int64_t>(kChunkBytes / (n * kBlock * size), 1, kMostBlocks);
  const int64_t chunk = std::min(fit, last - first);
  Tensor dz = torch::stable::new_empty(
      hidden, {n, chunk * kBlock}, in.head.tensor_cores ? ScalarType::BFloat16 : ScalarType::Float);
  g.dz = call.out(dz, "dz");
  std::optional<Tensor> hidden_sums, bias_sums;
  if (need_hidden && last - first > chunk) {
    hidden_sums = torch::stable::new_empty(hidden, {n, h}, ScalarType::Float);
    g.hidden_sums = static_cast<float*>(call.out(*hidden_sums, "hidden sums"));
  }
  if (need_bias) {
    bias_sums = torch::stable::new_empty(hidden, {cuda::head_row_tiles(in.head), chunk * kBlock},
                                         ScalarType::Float);
    g.bias_sums = static_cast<float*>(call.out(*bias_sums, "bias sums"));
  }
  for (int64_t block = first; block < last; block += chunk) {
    g.block_begin = block;
    g.block_end = std::min(block + chunk, last);
    g.first = block == first;
    g.last = g.block_end == last;
    call.check(cuda::selected_logprob_backward(g, call.stream()));
  }
  return {grad_hidden, grad_weight, grad_bias};
}

}  // namespace

RLIR_CUDA_OP("selected_logprob_backward", kSelectedLogprobBackwardSchema,
             &selected_logprob_backward_cuda)

}  // namespace rlir
