// What the CUDA ops of selected_logprob share: their inputs for the kernels.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <vector>

#include "cuda/selected_logprob.cuh"
#include "ops/cuda_call.h"
#include "ops/head_checks.h"

namespace rlir {

// A Head on a GPU and copies that it points to.
struct CudaHead {
  cuda::Head head{};
  std::vector<torch::stable::Tensor> copies;
};

// One operand for tensor cores: as it lies, or a copy in whole chunks of 16 bytes.
inline Matrix aligned_operand(CudaCall& call, const char* name, const torch::stable::Tensor& x,
                              const Matrix& m, std::vector<torch::stable::Tensor>& copies) {
  call.in(x, name);
  if (cuda::head_packed(m) || x.numel() == 0) return m;
  const int64_t rows = x.size(0), depth = x.size(1), stride = (depth + 7) / 8 * 8;
  torch::stable::Tensor copy = torch::stable::new_empty(x, {rows, stride});
  void* to = call.out(copy, name);
  call.check(cuda::head_pack(m, rows, depth, to, stride, call.stream()));
  copies.push_back(copy);
  return {to, m.dtype, stride, 1};
}

// Checks all but targets and support, which may be absent.
inline CudaHead cuda_head(CudaCall& call, const char* op, const torch::stable::Tensor& hidden,
                          const torch::stable::Tensor& weight,
                          const std::optional<torch::stable::Tensor>& bias,
                          const HeadShape& shape) {
  CudaHead out;
  cuda::Head& head = out.head;
  head.rows = shape.rows;
  head.depth = shape.depth;
  head.tokens = shape.tokens;
  head.low = shape.low;
  head.high = shape.high;
  head.temperature = shape.temperature;
  head.hidden = head_matrix(op, "hidden", hidden, hidden);
  head.weight = head_matrix(op, "weight", weight, hidden);
  head.tensor_cores =
      head.hidden.dtype == Dtype::kBFloat16 && head.weight.dtype == Dtype::kBFloat16;
  if (head.tensor_cores) {
    head.hidden = aligned_operand(call, "hidden", hidden, head.hidden, out.copies);
    head.weight = aligned_operand(call, "weight", weight, head.weight, out.copies);
  } else {
    call.in(hidden, "hidden");
    call.in(weight, "weight");
  }
  if (bias) {
    head.bias = call.in(*bias, "bias");
    head.bias_dtype = head_dtype(op, "bias", *bias);
    head.bias_stride = bias->stride(0);
  }
  return out;
}

inline void add_cuda_targets(CudaCall& call, cuda::Head& head, const torch::stable::Tensor& targets,
                             const std::optional<torch::stable::Tensor>& support) {
  head.targets = static_cast<const int64_t*>(call.in(targets, "targets"));
  head.target_stride = targets.stride(0);
  if (support) {
    head.support = static_cast<const uint8_t*>(call.in(*support, "support"));
    head.support_stride = support->stride(0);
  }
}

}  // namespace rlir
