// rlir::rotary and rlir::rotary_append_: schemas and checks, for every device.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <string>

#include "cpu/rotary.h"
#include "cpu/rotary_append.h"
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

// All of a call but the pointers to tensors of x's kind. `x` has been through rotary_rows.
inline cpu::Rotary rotary_call(const torch::stable::Tensor& x, const torch::stable::Tensor& cosine,
                               const torch::stable::Tensor& sine, bool interleaved,
                               bool transposed) {
  cpu::Rotary a{};
  a.dtype = check_rotary("rotary: x", x, x);
  const int64_t batch = x.size(0), dims = cosine.dim();
  a.tokens = x.size(1);
  a.heads = x.size(2);
  a.dim = x.size(3);
  RLIR_CHECK(dims == 2 || dims == 3, "rotary: cos must be [T, D] or [B, T, D], got ", dims,
             " dimensions");
  a.cosine = rotary_table("rotary: cos", cosine, x, dims);
  a.sine = rotary_table("rotary: sin", sine, x, dims);
  for (const torch::stable::Tensor* table : {&cosine, &sine}) {
    RLIR_CHECK(table->size(dims - 2) == a.tokens && (dims == 2 || table->size(0) == batch),
               "rotary: cos and sin must have the T and B of x, got otherwise");
  }
  a.x_batch = x.stride(0);
  a.x_token = x.stride(1);
  a.x_head = x.stride(2);
  a.table_batch = dims == 2 ? 0 : a.tokens * a.dim;
  a.interleaved = interleaved;
  a.transposed = transposed;
  return a;
}

inline cpu::RotaryRows rotary_strides(const torch::stable::Tensor& x) {
  return {x.stride(0), x.stride(1), x.stride(2)};
}

// Each element of a cache needs memory of its own, contiguous in D: a cache cannot be copied.
inline void check_rotary_cache(const std::string& what, const torch::stable::Tensor& cache) {
  RLIR_CHECK(cache.stride(3) == 1, what, " must be contiguous in D, got stride ", cache.stride(3));
  for (int64_t d = 0; d < 3; ++d) {
    RLIR_CHECK(cache.size(d) <= 1 || cache.stride(d) != 0, what,
               " must have memory for each of its elements, got stride 0");
  }
}

struct RotaryAppendCall {
  torch::stable::Tensor q, k, v;  // contiguous in D
  cpu::RotaryAppend args{};       // without pointers, but for tables
  int64_t limit = 0;              // of positions
};

inline RotaryAppendCall rotary_append_call(
    const torch::stable::Tensor& q, const torch::stable::Tensor& k, const torch::stable::Tensor& v,
    const torch::stable::Tensor& cosine, const torch::stable::Tensor& sine,
    const torch::stable::Tensor& cache_k, const torch::stable::Tensor& cache_v,
    const torch::stable::Tensor& positions, bool interleaved) {
  const Dtype dtype = check_rotary("rotary_append_: q", q, q);
  check_rotary("rotary_append_: k", k, q);
  check_rotary("rotary_append_: v", v, q);
  const Dtype to = check_rotary("rotary_append_: cache_k", cache_k, cache_k);
  check_rotary("rotary_append_: cache_v", cache_v, cache_k);
  RLIR_CHECK(cache_k.device() == q.device(),
             "rotary_append_: cache_k must be on one device with all, got another");
  RLIR_CHECK(to == dtype || to == Dtype::kBFloat16,
             "rotary_append_: cache_k must have q's dtype or be bfloat16, got dtype ",
             static_cast<int>(cache_k.scalar_type()));
  const int64_t batch = q.size(0), tokens = q.size(1), heads = k.size(2), dim = q.size(3);
  const int64_t capacity = cache_k.size(1);
  check_rotary_sizes("rotary_append_: k", k, batch, tokens, heads, dim);
  check_rotary_sizes("rotary_append_: v", v, batch, tokens, heads, dim);
  check_rotary_sizes("rotary_append_: cache_k", cache_k, batch, capacity, heads, dim);
  check_rotary_sizes("rotary_append_: cache_v", cache_v, batch, capacity, heads, dim);
  check_rotary_cache("rotary_append_: cache_k", cache_k);
  check_rotary_cache("rotary_append_: cache_v", cache_v);
  RLIR_CHECK(positions.device() == q.device() && positions.is_contiguous() &&
                 positions.scalar_type() == torch::headeronly::ScalarType::Long &&
                 positions.dim() == 2 && positions.size(0) == batch && positions.size(1) == tokens,
             "rotary_append_: positions must be contiguous int64 [B, T], got otherwise");
  RotaryAppendCall call{rotary_rows(q), rotary_rows(k), rotary_rows(v)};
  cpu::RotaryAppend& a = call.args;
  a.dtype = dtype;
  a.to = to;
  a.q_at = rotary_strides(call.q);
  a.k_at = rotary_strides(call.k);
  a.v_at = rotary_strides(call.v);
  a.cache_k_at = rotary_strides(cache_k);
  a.cache_v_at = rotary_strides(cache_v);
  a.cosine = rotary_table("rotary_append_: cos", cosine, q, 2);
  a.sine = rotary_table("rotary_append_: sin", sine, q, 2);
  RLIR_CHECK(sine.size(0) == cosine.size(0), "rotary_append_: sin must have ", cosine.size(0),
             " positions as cos has, got ", sine.size(0));
  call.limit = std::min(capacity, cosine.size(0));
  a.tokens = tokens;
  a.heads = q.size(2);
  a.kv_heads = heads;
  a.dim = dim;
  a.interleaved = interleaved;
  return call;
}

}  // namespace rlir
