// A tensor's number format as kernels name it; any other is refused.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "core/check.h"
#include "core/dtype.h"

namespace rlir {

// `what`: "op: name".
inline Dtype float_dtype(const char* what, const torch::stable::Tensor& x) {
  using torch::headeronly::ScalarType;
  switch (x.scalar_type()) {
    case ScalarType::Double:
      return Dtype::kFloat64;
    case ScalarType::Float:
      return Dtype::kFloat32;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    case ScalarType::Half:
      return Dtype::kFloat16;
    default:
      fail(what, " must be float64, float32, bfloat16 or float16, got dtype ",
           static_cast<int>(x.scalar_type()));
  }
}

}  // namespace rlir
