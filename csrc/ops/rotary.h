// rlir::rotary and rlir::rotary_append_: schemas and checks, for every device.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <string>

#include "ops/float_dtype.h"

namespace rlir {

inline constexpr const char* kRotarySchema =
    "rotary(Tensor x, Tensor cos, Tensor sin, bool interleaved, bool transposed) -> Tensor";
inline constexpr const char* kRotaryAppendSchema =
    "rotary_append_(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor(a!) cache_k, "
    "Tensor(b!) cache_v, Tensor positions, bool interleaved) -> Tensor";

// `what`: "op: name". [B, T, H, D], float32 or bfloat16, D even.
inline Dtype check_rotary(const std::string& what, const torch::stable::Tensor& x,
                          const torch::stable::Tensor& like) {
  RLIR_CHECK(x.device() == like.device(), what, " must be on one device with all, got another");
  RLIR_CHECK(x.dim() == 4, what, " must be [B, T, H, D], got ", x.dim(), " dimensions");
  RLIR_CHECK(x.size(3) >= 2 && x.size(3) % 2 == 0, what, " must have an even D >= 2, got ",
             x.size(3));
  const Dtype dtype = float_dtype(what.c_str(), x);
  RLIR_CHECK(dtype == Dtype::kFloat32 || dtype == Dtype::kBFloat16, what,
             " must be float32 or bfloat16, got dtype ", static_cast<int>(x.scalar_type()));
  RLIR_CHECK(x.scalar_type() == like.scalar_type(), what, " must have the dtype of all, got ",
             static_cast<int>(x.scalar_type()));
  return dtype;
}

inline void check_rotary_sizes(const std::string& what, const torch::stable::Tensor& x, int64_t b,
                               int64_t t, int64_t h, int64_t d) {
  RLIR_CHECK(x.size(0) == b && x.size(1) == t && x.size(2) == h && x.size(3) == d, what,
             " must be [", b, ", ", t, ", ", h, ", ", d, "], got [", x.size(0), ", ", x.size(1),
             ", ", x.size(2), ", ", x.size(3), "]");
}

// cos or sin: float32, contiguous, `dims` dimensions, the last D.
inline const float* rotary_table(const std::string& what, const torch::stable::Tensor& table,
                                 const torch::stable::Tensor& like, int64_t dims) {
  RLIR_CHECK(table.device() == like.device(), what, " must be on one device with all, got another");
  RLIR_CHECK(table.scalar_type() == torch::headeronly::ScalarType::Float && table.is_contiguous() &&
                 table.dim() == dims && table.size(dims - 1) == like.size(3),
             what, " must be contiguous float32 with ", dims, " dimensions, the last D, got ",
             "otherwise");
  return static_cast<const float*>(table.const_data_ptr());
}

// Copies what is not contiguous in D.
inline torch::stable::Tensor rotary_rows(const torch::stable::Tensor& x) {
  return x.stride(3) == 1 ? x : torch::stable::contiguous(x);
}

}  // namespace rlir
