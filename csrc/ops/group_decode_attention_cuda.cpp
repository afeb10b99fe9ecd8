// rlir::group_decode_attention on CUDA: as in video_attention_cuda.cpp.
#include "cuda/group_decode_attention.cuh"

#include "ops/attention_cuda.h"
#include "ops/group_decode_attention.h"

namespace rlir {
namespace {

using torch::stable::Tensor;

constexpr const char* kOp = "group_decode_attention";

Tensor group_decode_attention_cuda(const Tensor& q, const Tensor& prefix_k, const Tensor& prefix_v,
                                   const Tensor& suffix_k, const Tensor& suffix_v,
                                   const Tensor& prefix_lengths, const Tensor& suffix_lengths,
                                   const std::optional<Tensor>& q_positions, std::string mask,
                                   std::vector<int64_t> mask_numbers, int64_t group_size,
                                   double scale) {
  RLIR_CHECK(q.dim() == 4, kOp, ": q must be [B G, T, Hq, D], got ", q.dim(), " dimensions");
  RLIR_CHECK(group_size >= 1 && q.size(0) % group_size == 0, kOp,
             ": q must have a multiple of group_size ", group_size, " rows, got ", q.size(0));
  CudaCall call(kOp, q);
  CudaAttention in(call, kOp);
  cuda::GroupDecode g{};
  g.in.mask = attention_mask(kOp, mask, mask_numbers);
  g.in.scale = scale;
  in.check_keys("prefix", q, prefix_k, prefix_v, q.size(0) / group_size);
  in.check_keys("suffix", q, suffix_k, suffix_v, q.size(0));
  RLIR_CHECK(prefix_k.size(2) == suffix_k.size(2), kOp, ": suffix must have ", prefix_k.size(2),
             " heads as prefix has, got ", suffix_k.size(2));
  in.check_integers("prefix_lengths", prefix_lengths, q, q.size(0) / group_size);
  in.check_integers("suffix_lengths", suffix_lengths, q, q.size(0));
  Tensor out = torch::stable::new_empty(q, {q.size(0), q.size(1), q.size(2), q.size(3)});
  if (out.numel() == 0) return out;
  in.queries(g.in, q, q_positions, std::nullopt);
  g.in.part[0] = in.keys(prefix_k, prefix_v, prefix_lengths);
  g.in.part[1] = in.keys(suffix_k, suffix_v, suffix_lengths);
  g.in.parts = 2;
  g.in.group = group_size;
  g.in.kv_heads = prefix_k.size(2);
  in.check_counts(g.in, group_size);
  g.out = call.out(out, "out");
  if (g.in.dtype == Dtype::kFloat32) {  // the CPU's bits: the parts are one sequence
    call.check(cuda::video_attention({g.in, g.out, nullptr}, call.stream()));
    return out;
  }
  const int64_t rows = cuda::group_decode_chunks(g.in) * (out.numel() / g.in.depth);
  g.sums = in.scratch(q, "sums of chunks", rows * g.in.depth);
  g.scales = in.scratch(q, "scales of chunks", rows * 2);
  call.check(cuda::group_decode_attention(g, call.stream()));
  return out;
}

}  // namespace

RLIR_CUDA_OP("group_decode_attention", kGroupDecodeAttentionSchema, &group_decode_attention_cuda)

}  // namespace rlir
