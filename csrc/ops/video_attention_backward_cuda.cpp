// rlir::video_attention_backward on CUDA: as in video_attention_cuda.cpp.
#include <tuple>

#include "ops/attention_cuda.h"
#include "ops/video_attention.h"

namespace rlir {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr const char* kOp = "video_attention";

std::tuple<Tensor, Tensor, Tensor> video_attention_backward_cuda(
    const Tensor& grad_out, const std::optional<Tensor>& grad_lse, const Tensor& q, const Tensor& k,
    const Tensor& v, const Tensor& out, const Tensor& lse, const std::optional<Tensor>& q_positions,
    const std::optional<Tensor>& q_lengths, const std::optional<Tensor>& k_lengths,
    std::string mask, std::vector<int64_t> mask_numbers, double scale) {
  const AttentionShape s = attention_shape(kOp, q, k, v);
  CudaCall call(kOp, q);
  CudaAttention in(call, kOp);
  cuda::AttentionBackward g{};
  g.in.mask = attention_mask(kOp, mask, mask_numbers);
  g.in.scale = scale;
  in.check_integers("k_lengths", k_lengths, q, s.batch);
  Tensor dq = torch::stable::new_empty(q, {s.batch, s.queries, s.heads, s.dim});
  Tensor dk = torch::stable::new_empty(k, {s.batch, s.keys, s.kv_heads, s.dim});
  Tensor dv = torch::stable::new_empty(v, {s.batch, s.keys, s.kv_heads, s.dim});
  if (s.batch * s.queries == 0) {
    torch::stable::zero_(dk);
    torch::stable::zero_(dv);
    return {dq, dk, dv};
  }
  in.queries(g.in, q, q_positions, q_lengths);
  g.in.part[0] = in.keys(k, v, k_lengths);
  g.in.parts = 1;
  g.in.group = 1;
  g.in.kv_heads = s.kv_heads;
  in.check_counts(g.in, 1);
  in.gradient(g, grad_out, out, lse);
  if (grad_lse) {
    RLIR_CHECK(grad_lse->scalar_type() == ScalarType::Float && grad_lse->dim() == 3 &&
                   grad_lse->numel() == lse.numel(),
               kOp, ": the gradient of lse must be float32 [B, T, Hq], got otherwise");
    g.grad_lse = static_cast<const float*>(call.in(*grad_lse, "grad_lse"));
    g.grad_lse_sequence = grad_lse->stride(0);
    g.grad_lse_token = grad_lse->stride(1);
    g.grad_lse_head = grad_lse->stride(2);
  }
  g.dq = call.out(dq, "dq");
  g.dk[0] = call.out(dk, "dk");
  g.dv[0] = call.out(dv, "dv");
  call.check(cuda::attention_gradient_rows(g, call.stream()));
  call.check(cuda::attention_gradient_queries(g, call.stream()));
  if (s.keys > 0) call.check(cuda::attention_gradient_keys(g, nullptr, 0, call.stream()));
  return {dq, dk, dv};
}

}  // namespace

RLIR_CUDA_OP("video_attention_backward", kVideoAttentionBackwardSchema,
             &video_attention_backward_cuda)

}  // namespace rlir
