// Tensors of rows as kernels want them: [N, D], float32 or bfloat16, contiguous in a row.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "ops/float_dtype.h"

namespace rlir {

// `what`: "op: name". Copies what is not contiguous in a row.
inline torch::stable::Tensor rows_of(const char* what, const torch::stable::Tensor& x) {
  RLIR_CHECK(x.is_cpu(), what, " must be on the CPU, got another device");
  RLIR_CHECK(x.dim() == 2, what, " must be [N, D], got ", x.dim(), " dimensions");
  const Dtype dtype = float_dtype(what, x);
  RLIR_CHECK(dtype == Dtype::kFloat32 || dtype == Dtype::kBFloat16, what,
             " must be float32 or bfloat16, got dtype ", static_cast<int>(x.scalar_type()));
  return x.size(1) == 1 || x.stride(1) == 1 ? x : torch::stable::contiguous(x);
}

inline void check_same_rows(const char* what, const torch::stable::Tensor& x,
                            const torch::stable::Tensor& y) {
  RLIR_CHECK(x.size(0) == y.size(0) && x.size(1) == y.size(1), what, " must be [", y.size(0), ", ",
             y.size(1), "], got [", x.size(0), ", ", x.size(1), "]");
}

// Rows a thread takes at least: some 16 thousand elements.
inline int64_t rows_per_task(int64_t size) {
  const int64_t rows = 16384 / (size > 0 ? size : 1);
  return rows > 0 ? rows : 1;
}

}  // namespace rlir
