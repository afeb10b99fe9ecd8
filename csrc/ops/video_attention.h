// rlir::video_attention and its backward: schemas, and checks that CPU and CUDA share.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <string>
#include <vector>

#include "core/check.h"
#include "ops/attention_mask.h"

namespace rlir {

inline constexpr const char* kVideoAttentionSchema =
    "video_attention(Tensor q, Tensor k, Tensor v, Tensor? q_positions, Tensor? q_lengths, "
    "Tensor? k_lengths, str mask, int[] mask_numbers, float scale) -> (Tensor, Tensor)";
inline constexpr const char* kVideoAttentionBackwardSchema =
    "video_attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, "
    "Tensor out, Tensor lse, Tensor? q_positions, Tensor? q_lengths, Tensor? k_lengths, str mask, "
    "int[] mask_numbers, float scale) -> (Tensor, Tensor, Tensor)";

struct AttentionShape {
  int64_t batch, queries, keys, heads, kv_heads, dim;
  bool bfloat16;

  int64_t group() const { return heads / kv_heads; }
};

// A tensor [batch, tokens, heads, dim] of the call's dtype, in which a row is contiguous.
inline torch::stable::Tensor attention_rows(const char* op, const char* name,
                                            const torch::stable::Tensor& x,
                                            const torch::stable::Tensor& q) {
  RLIR_CHECK(x.dim() == 4, op, ": ", name, " must be [batch, tokens, heads, dim], got ", x.dim(),
             " dimensions");
  RLIR_CHECK(x.scalar_type() == q.scalar_type() && x.device() == q.device(), op, ": ", name,
             " must have q's dtype and device, got otherwise");
  return x.size(3) <= 1 || x.stride(3) == 1 ? x : torch::stable::contiguous(x);
}

inline AttentionShape attention_shape(const char* op, const torch::stable::Tensor& q,
                                      const torch::stable::Tensor& k,
                                      const torch::stable::Tensor& v) {
  using torch::headeronly::ScalarType;
  const bool bfloat16 = q.scalar_type() == ScalarType::BFloat16;
  RLIR_CHECK(bfloat16 || q.scalar_type() == ScalarType::Float, op,
             ": q must be float32 or bfloat16, got dtype ", static_cast<int>(q.scalar_type()));
  for (const auto* x : {&q, &k, &v}) {
    RLIR_CHECK(x->dim() == 4, op, ": q, k and v must be [batch, tokens, heads, dim], got ",
               x->dim(), " dimensions");
  }
  const AttentionShape s{q.size(0), q.size(1), k.size(1), q.size(2),
                         k.size(2), q.size(3), bfloat16};
  RLIR_CHECK(s.dim >= 1 && s.dim <= 256, op, ": dim must be from 1 to 256, got ", s.dim);
  RLIR_CHECK(s.kv_heads >= 1 && s.heads >= 1 && s.heads % s.kv_heads == 0, op,
             ": q's heads must be a multiple of k's, got ", s.heads, " and ", s.kv_heads);
  RLIR_CHECK(s.keys < INT32_MAX && s.queries < INT32_MAX, op,
             ": a sequence must be shorter than 2^31, got ", s.keys);
  for (int i = 0; i < 4; ++i) {
    RLIR_CHECK(k.size(i) == v.size(i) && (i == 1 || i == 2 || k.size(i) == q.size(i)), op,
               ": k and v must be [", s.batch, ", keys, kv_heads, ", s.dim, "], got [", k.size(0),
               ", ", k.size(1), ", ", k.size(2), ", ", k.size(3), "] and [", v.size(0), ", ",
               v.size(1), ", ", v.size(2), ", ", v.size(3), "]");
  }
  return s;
}

// Lengths, or `all` for each of n.
inline std::vector<int64_t> attention_lengths(const char* op, const char* name,
                                              const std::optional<torch::stable::Tensor>& x,
                                              int64_t n, int64_t all) {
  using torch::headeronly::ScalarType;
  std::vector<int64_t> out(n, all);
  if (!x) return out;
  RLIR_CHECK(
      x->is_cpu() && x->dim() == 1 && x->size(0) == n && x->scalar_type() == ScalarType::Long, op,
      ": ", name, " must be int64 [", n, "], got otherwise");
  for (int64_t i = 0; i < n; ++i) {
    out[i] = x->const_data_ptr<int64_t>()[i * x->stride(0)];
    RLIR_CHECK(out[i] >= 0 && out[i] <= all, op, ": ", name, " must be from 0 to ", all, ", got ",
               out[i]);
  }
  return out;
}

// What each query sees: [batch][queries]. Queries stand at `positions` [batch, queries], or at the
// end of their keys. What lies beyond a query's length sees nothing.
inline std::vector<Reach> attention_reach(const char* op, const AttentionMask& mask,
                                          const std::optional<torch::stable::Tensor>& positions,
                                          const std::vector<int64_t>& q_lengths,
                                          const std::vector<int64_t>& k_lengths, int64_t queries) {
  using torch::headeronly::ScalarType;
  const auto batch = static_cast<int64_t>(q_lengths.size());
  const int64_t* given = nullptr;
  int64_t strides[2] = {0, 0};
  if (positions) {
    const bool rows = positions->dim() == 2;
    RLIR_CHECK(positions->is_cpu() && positions->scalar_type() == ScalarType::Long &&
                   (rows || positions->dim() == 1) && (!rows || positions->size(0) == batch) &&
                   positions->size(rows ? 1 : 0) == queries,
               op, ": q_positions must be int64 [", batch, ", ", queries, "] or [", queries,
               "], got otherwise");
    given = positions->const_data_ptr<int64_t>();
    strides[0] = rows ? positions->stride(0) : 0;
    strides[1] = positions->stride(rows ? 1 : 0);
  }
  std::vector<Reach> out(batch * queries, Reach{0, 0, kNoOwn, 0});
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t t = 0; t < q_lengths[b]; ++t) {
      const int64_t position =
          given ? given[b * strides[0] + t * strides[1]] : k_lengths[b] - q_lengths[b] + t;
      RLIR_CHECK(!given || (position >= 0 && position < INT32_MAX), op,
                 ": q_positions must be from 0 and below 2^31, got ", position);
      if (position < 0) continue;  // more queries than keys
      out[b * queries + t] = reach_of(mask, position, k_lengths[b]);
    }
  }
  return out;
}

// What the backward pass gets back: out and lse as the forward pass made them.
inline void check_results(const char* op, const AttentionShape& s,
                          const torch::stable::Tensor& grad,
                          const std::optional<torch::stable::Tensor>& grad_lse,
                          const torch::stable::Tensor& out, const torch::stable::Tensor& lse) {
  using torch::headeronly::ScalarType;
  const auto rows = [&](const torch::stable::Tensor& x, int64_t dims) {
    return x.dim() == dims && x.size(0) == s.batch && x.size(1) == s.queries &&
           x.size(2) == s.heads && (dims == 3 || x.size(3) == s.dim);
  };
  RLIR_CHECK(
      rows(grad, 4) && rows(out, 4) && out.is_contiguous() &&
          out.scalar_type() == grad.scalar_type() && rows(lse, 3) &&
          lse.scalar_type() == ScalarType::Float &&
          (!grad_lse || (rows(*grad_lse, 3) && grad_lse->scalar_type() == ScalarType::Float)),
      op, ": the gradient must be as the results, got otherwise");
}

}  // namespace rlir
