// rlir::group_attention and its backward on CUDA: as in video_attention_cuda.cpp.
#include "cuda/group_attention.cuh"

#include <tuple>

#include "ops/attention_cuda.h"
#include "ops/group_attention.h"

namespace rlir {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr const char* kOp = "group_attention";

struct GroupTensors {
  Tensor q_prefix, k_prefix, v_prefix, q_suffix, k_suffix, v_suffix;
  int64_t group_size;
  AttentionMask mask;
  double scale;

  int64_t groups() const { return q_prefix.size(0); }
};

void check(const CudaAttention& in, const GroupTensors& t) {
  RLIR_CHECK(t.q_suffix.dim() == 4 && t.q_prefix.dim() == 4, kOp,
             ": queries must be [N, T, Hq, D], got ", t.q_prefix.dim(), " and ", t.q_suffix.dim(),
             " dimensions");
  RLIR_CHECK(t.group_size >= 1 && t.q_suffix.size(0) == t.groups() * t.group_size, kOp,
             ": q_suffix must have ", t.groups(), " groups of ", t.group_size, " rows, got ",
             t.q_suffix.size(0));
  in.check_keys("prefix", t.q_prefix, t.k_prefix, t.v_prefix, t.groups());
  in.check_keys("suffix", t.q_suffix, t.k_suffix, t.v_suffix, t.q_suffix.size(0));
  RLIR_CHECK(t.q_prefix.size(1) == t.k_prefix.size(1) && t.q_suffix.size(1) == t.k_suffix.size(1) &&
                 t.q_prefix.size(2) == t.q_suffix.size(2) &&
                 t.k_prefix.size(2) == t.k_suffix.size(2) &&
                 t.q_prefix.size(3) == t.q_suffix.size(3) &&
                 t.q_prefix.scalar_type() == t.q_suffix.scalar_type() &&
                 t.q_prefix.device() == t.q_suffix.device(),
             kOp, ": prefix and suffix must have a query a key, and alike heads, got otherwise");
}

cuda::Attention prefix_call(CudaAttention& in, const GroupTensors& t) {
  cuda::Attention a{};
  a.mask = t.mask;
  a.scale = t.scale;
  a.part[0] = in.keys(t.k_prefix, t.v_prefix, std::nullopt);
  a.parts = 1;
  a.group = 1;
  a.kv_heads = t.k_prefix.size(2);
  in.queries(a, t.q_prefix, std::nullopt, std::nullopt);
  in.check_counts(a, 1);
  return a;
}

cuda::Attention suffix_call(CudaAttention& in, const GroupTensors& t) {
  cuda::Attention a = prefix_call(in, t);
  a.part[1] = in.keys(t.k_suffix, t.v_suffix, std::nullopt);
  a.parts = 2;
  a.group = t.group_size;
  in.queries(a, t.q_suffix, std::nullopt, std::nullopt);
  in.check_counts(a, t.group_size);
  return a;
}

Tensor like(const Tensor& x) {
  return torch::stable::new_empty(x, {x.size(0), x.size(1), x.size(2), x.size(3)});
}

std::tuple<Tensor, Tensor, Tensor, Tensor> group_attention_cuda(
    const Tensor& q_prefix, const Tensor& k_prefix, const Tensor& v_prefix, const Tensor& q_suffix,
    const Tensor& k_suffix, const Tensor& v_suffix, int64_t group_size, std::string mask,
    std::vector<int64_t> mask_numbers, double scale) {
  CudaCall call(kOp, q_prefix);
  CudaAttention in(call, kOp);
  const GroupTensors t{q_prefix, k_prefix, v_prefix,   q_suffix,
                       k_suffix, v_suffix, group_size, attention_mask(kOp, mask, mask_numbers),
                       scale};
  check(in, t);
  Tensor out[2] = {like(q_prefix), like(q_suffix)}, lse[2];
  for (int i = 0; i < 2; ++i) {
    lse[i] = torch::stable::new_empty(out[i], {out[i].size(0), out[i].size(1), out[i].size(2)},
                                      ScalarType::Float);
  }
  cuda::GroupForward g{};
  g.has_prefix = lse[0].numel() > 0;
  g.has_suffix = lse[1].numel() > 0;
  if (g.has_prefix) {
    g.prefix = {prefix_call(in, t), call.out(out[0], "out_prefix"),
                static_cast<float*>(call.out(lse[0], "lse_prefix"))};
  }
  if (g.has_suffix) {
    g.suffix = {suffix_call(in, t), call.out(out[1], "out_suffix"),
                static_cast<float*>(call.out(lse[1], "lse_suffix"))};
  }
  call.check(cuda::group_attention(g, call.stream()));
  return {out[0], lse[0], out[1], lse[1]};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> group_attention_backward_cuda(
    const std::optional<Tensor>& grad_out_prefix, const std::optional<Tensor>& grad_out_suffix,
    const Tensor& q_prefix, const Tensor& k_prefix, const Tensor& v_prefix, const Tensor& q_suffix,
    const Tensor& k_suffix, const Tensor& v_suffix, const Tensor& out_prefix,
    const Tensor& lse_prefix, const Tensor& out_suffix, const Tensor& lse_suffix,
    int64_t group_size, std::string mask, std::vector<int64_t> mask_numbers, double scale) {
  CudaCall call(kOp, q_prefix);
  CudaAttention in(call, kOp);
  const GroupTensors t{q_prefix, k_prefix, v_prefix,   q_suffix,
                       k_suffix, v_suffix, group_size, attention_mask(kOp, mask, mask_numbers),
                       scale};
  check(in, t);
  Tensor dq[2] = {like(q_prefix), like(q_suffix)}, dk[2] = {like(k_prefix), like(k_suffix)},
         dv[2] = {like(v_prefix), like(v_suffix)};
  cuda::GroupBackward g{};
  g.has_prefix = grad_out_prefix && lse_prefix.numel() > 0;
  g.has_suffix = grad_out_suffix && lse_suffix.numel() > 0;
  // What gets no gradients, which the kernels do not write.
  const bool none[2] = {!g.has_prefix, !g.has_suffix};
  for (int i = 0; i < 2; ++i) {
    if (none[i]) torch::stable::zero_(dq[i]);
    if (i == 0 ? none[0] && none[1] : none[1]) {
      torch::stable::zero_(dk[i]);
      torch::stable::zero_(dv[i]);
    }
  }
  if (!g.has_prefix && !g.has_suffix) return {dq[0], dk[0], dv[0], dq[1], dk[1], dv[1]};
  void* const dk_prefix = call.out(dk[0], "dk_prefix");
  void* const dv_prefix = call.out(dv[0], "dv_prefix");
  if (g.has_prefix) {
    g.prefix.in = prefix_call(in, t);
    in.gradient(g.prefix, *grad_out_prefix, out_prefix, lse_prefix);
    g.prefix.dq = call.out(dq[0], "dq_prefix");
    g.prefix.dk[0] = dk_prefix;
    g.prefix.dv[0] = dv_prefix;
  }
  if (g.has_suffix) {
    g.suffix.in = suffix_call(in, t);
    in.gradient(g.suffix, *grad_out_suffix, out_suffix, lse_suffix);
    g.suffix.dq = call.out(dq[1], "dq_suffix");
    g.suffix.dk[0] = dk_prefix;
    g.suffix.dv[0] = dv_prefix;
    g.suffix.dk[1] = call.out(dk[1], "dk_suffix");
    g.suffix.dv[1] = call.out(dv[1], "dv_suffix");
  }
  call.check(cuda::group_attention_backward(g, call.stream()));
  return {dq[0], dk[0], dv[0], dq[1], dk[1], dv[1]};
}

}  // namespace

RLIR_CUDA_OP("group_attention", kGroupAttentionSchema, &group_attention_cuda)
RLIR_CUDA_OP("group_attention_backward", kGroupAttentionBackwardSchema,
             &group_attention_backward_cuda)

}  // namespace rlir
