// rlir::video_attention and its backward: CPU dispatch. Formulas: cpu/video_attention.h.
#include "ops/video_attention.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "core/cpu_isa.h"
#include "core/scratch.h"
#include "cpu/video_attention.h"
#include "ops/attention_call.h"

namespace rlir {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr const char* kOp = "video_attention";

std::tuple<Tensor, Tensor> video_attention_cpu(const Tensor& q_in, const Tensor& k_in,
                                               const Tensor& v_in,
                                               const std::optional<Tensor>& q_positions,
                                               const std::optional<Tensor>& q_lengths,
                                               const std::optional<Tensor>& k_lengths,
                                               std::string mask, std::vector<int64_t> mask_numbers,
                                               double scale) {
  const AttentionShape s = attention_shape(kOp, q_in, k_in, v_in);
  const Tensor q = attention_rows(kOp, "q", q_in, q_in), k = attention_rows(kOp, "k", k_in, q_in),
               v = attention_rows(kOp, "v", v_in, q_in);
  Tensor out = torch::stable::new_empty(q, {s.batch, s.queries, s.heads, s.dim});
  Tensor lse = torch::stable::new_empty(q, {s.batch, s.queries, s.heads}, ScalarType::Float);
  if (lse.numel() == 0) return {out, lse};
  const AttentionMask m = attention_mask(kOp, mask, mask_numbers);
  const auto keys = attention_lengths(kOp, "k_lengths", k_lengths, s.batch, s.keys);
  const auto reach = attention_reach(
      kOp, m, q_positions, attention_lengths(kOp, "q_lengths", q_lengths, s.batch, s.queries), keys,
      s.queries);
  const cpu::AttentionSizes sizes = RLIR_CPU_KERNEL_BF16(attention_sizes)(s.bfloat16, s.dim);
  const int64_t panels = (s.queries * s.group() + sizes.panel - 1) / sizes.panel;
  const auto kernel = RLIR_CPU_KERNEL_BF16(attend);
  // The last panels see most: they go first.
  for_tasks(s.batch * s.kv_heads * panels, sizes.scratch, [&](int64_t task, void* scratch) {
    const int64_t rest = task % (s.batch * s.kv_heads), head = rest % s.kv_heads,
                  b = rest / s.kv_heads;
    cpu::VideoAttention a{};
    a.bfloat16 = s.bfloat16;
    a.dim = s.dim;
    a.scale = log2_scale(scale);
    a.mask = m;
    a.queries = queries_of(q, b, head * s.group(), 1, s.queries, s.group());
    a.queries.reach = reach.data() + b * s.queries;
    a.keys = one_segment(k, v, b, head, keys[b]);
    a.out = at(out, b, 0, head * s.group());
    a.out_stride = {0, out.stride(1), out.stride(2)};
    a.lse = lse.mutable_data_ptr<float>() + b * lse.stride(0) + head * s.group();
    a.lse_stride = {0, lse.stride(1), 1};
    kernel(a, panels - 1 - task / (s.batch * s.kv_heads), scratch);
  });
  return {out, lse};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(rlir, m) {
  m.def(kVideoAttentionSchema, {at::Tag::pt2_compliant_tag});
}

STABLE_TORCH_LIBRARY_IMPL(rlir, CPU, m) {
  m.impl("video_attention", TORCH_BOX(&video_attention_cpu));
}

}  // namespace rlir
