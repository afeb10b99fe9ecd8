// rlir::video_attention on CUDA. Nothing here waits for the device, and all memory comes from
// torch's allocator: a call can be captured in a CUDA graph. Lengths and positions are looked at by
// the kernels alone.
#include <tuple>

#include "ops/attention_cuda.h"
#include "ops/video_attention.h"

namespace rlir {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr const char* kOp = "video_attention";

std::tuple<Tensor, Tensor> video_attention_cuda(const Tensor& q, const Tensor& k, const Tensor& v,
                                                const std::optional<Tensor>& q_positions,
                                                const std::optional<Tensor>& q_lengths,
                                                const std::optional<Tensor>& k_lengths,
                                                std::string mask, std::vector<int64_t> mask_numbers,
                                                double scale) {
  const AttentionShape s = attention_shape(kOp, q, k, v);
  CudaCall call(kOp, q);
  CudaAttention in(call, kOp);
  cuda::AttentionForward f{};
  f.in.mask = attention_mask(kOp, mask, mask_numbers);
  f.in.scale = scale;
  in.check_integers("k_lengths", k_lengths, q, s.batch);
  Tensor out = torch::stable::new_empty(q, {s.batch, s.queries, s.heads, s.dim});
  Tensor lse = torch::stable::new_empty(q, {s.batch, s.queries, s.heads}, ScalarType::Float);
  if (lse.numel() == 0) return {out, lse};
  in.queries(f.in, q, q_positions, q_lengths);
  f.in.part[0] = in.keys(k, v, k_lengths);
  f.in.parts = 1;
  f.in.group = 1;
  f.in.kv_heads = s.kv_heads;
  in.check_counts(f.in, 1);
  f.out = call.out(out, "out");
  f.lse = static_cast<float*>(call.out(lse, "lse"));
  call.check(cuda::video_attention(f, call.stream()));
  return {out, lse};
}

}  // namespace

RLIR_CUDA_OP("video_attention", kVideoAttentionSchema, &video_attention_cuda)

}  // namespace rlir
