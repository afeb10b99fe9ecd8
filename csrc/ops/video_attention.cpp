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
  const cpu::AttentionSizes sizes = RLIR_CPU_KERNEL_AMX(attention_sizes)(s.bfloat16, s.dim);
  const int64_t panels = (s.queries * s.group() + sizes.panel - 1) / sizes.panel;
  const auto call_of = [&](int64_t unit) {
    const int64_t b = unit / s.kv_heads, head = unit % s.kv_heads;
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
    return a;
  };
  const auto kernel = RLIR_CPU_KERNEL_AMX(attend);
  // Of a row's keys, only the blocks that a query sees are packed: in a window these are few.
  std::vector<std::pair<int64_t, int64_t>> seen;
  for (int64_t b = 0; b < s.batch; ++b) {
    seen.push_back(blocks_seen(reach.data() + b * s.queries, s.queries));
  }
  const Packing packing(s.batch * s.kv_heads, panels, blocks_of(s.keys), sizes);
  packing.each([&](int64_t first, int64_t units, char* packed) {
    packing.pack(first, units, packed, [&](int64_t unit, int64_t index) {
      const auto [low, high] = seen[unit / s.kv_heads];
      return std::pair(call_of(unit), low <= index && index < high ? index : -1);
    });
    const int64_t together = packing.together(units), parts = (panels + together - 1) / together;
    for_tasks(units * parts, sizes.scratch, [&](int64_t task, void* scratch) {
      const int64_t unit = task / parts;
      cpu::VideoAttention a = call_of(first + unit);
      if (packed != nullptr) a.packed = {{packed + unit * packing.bytes(), nullptr}, INT64_MAX};
      const int64_t panel = (parts - 1 - task % parts) * together;  // the last ones see most
      kernel(a, panel, std::min(together, panels - panel), scratch);
    });
  });
  return {out, lse};
}

// Wide panels in shares of about the same work, so that there are tasks enough: [shares + 1] where
// they begin. They depend on what is seen alone.
std::vector<int64_t> shares_of(const cpu::Queries& q, int64_t count) {
  const int64_t panels = (q.lanes() + cpu::kWidePanel - 1) / cpu::kWidePanel;
  std::vector<int64_t> work(panels + 1, 0);
  for (int64_t i = 0; i < panels; ++i) {
    const int64_t row = i * cpu::kWidePanel / q.heads;
    const int64_t last = std::min((i + 1) * cpu::kWidePanel, q.lanes()) - 1;
    const auto [low, high] = blocks_seen(q.reach + row, last / q.heads - row + 1);
    work[i + 1] = work[i] + 1 + high - low;
  }
  std::vector<int64_t> begins{0};
  for (int64_t i = 1; i < count; ++i) {
    const auto at = std::lower_bound(work.begin(), work.end(), work[panels] * i / count);
    begins.push_back(std::max<int64_t>(begins.back(), at - work.begin()));
  }
  begins.push_back(panels);
  return begins;
}

std::tuple<Tensor, Tensor, Tensor> video_attention_backward_cpu(
    const Tensor& grad_out, const std::optional<Tensor>& grad_lse, const Tensor& q_in,
    const Tensor& k_in, const Tensor& v_in, const Tensor& out, const Tensor& lse,
    const std::optional<Tensor>& q_positions, const std::optional<Tensor>& q_lengths,
    const std::optional<Tensor>& k_lengths, std::string mask, std::vector<int64_t> mask_numbers,
    double scale) {
  const AttentionShape s = attention_shape(kOp, q_in, k_in, v_in);
  const Tensor q = attention_rows(kOp, "q", q_in, q_in), k = attention_rows(kOp, "k", k_in, q_in),
               v = attention_rows(kOp, "v", v_in, q_in),
               grad = attention_rows(kOp, "the gradient", grad_out, q_in);
  check_results(kOp, s, grad, grad_lse, out, lse);
  Tensor dq = torch::stable::new_empty(q, {s.batch, s.queries, s.heads, s.dim});
  Tensor dk = torch::stable::new_empty(q, {s.batch, s.keys, s.kv_heads, s.dim});
  Tensor dv = torch::stable::new_empty(q, {s.batch, s.keys, s.kv_heads, s.dim});
  if (dq.numel() == 0 && dk.numel() == 0) return {dq, dk, dv};
  const AttentionMask m = attention_mask(kOp, mask, mask_numbers);
  const auto keys = attention_lengths(kOp, "k_lengths", k_lengths, s.batch, s.keys);
  const auto reach = attention_reach(
      kOp, m, q_positions, attention_lengths(kOp, "q_lengths", q_lengths, s.batch, s.queries), keys,
      s.queries);
  // Sums of dk and of dv of each (row, key head, share).
  const int64_t units = s.batch * s.kv_heads, shares = shares_for(units);
  const int64_t share = s.keys * cpu::attention_stride(s.dim);
  const Scratch sums(2 * units * shares * share * 4);
  float *dk_sums = sums.get<float>(), *dv_sums = dk_sums + units * shares * share;
  const auto call_of = [&](int64_t unit) {
    const int64_t b = unit / s.kv_heads, head = unit % s.kv_heads, first = head * s.group();
    cpu::AttentionBackward a{};
    a.call.bfloat16 = s.bfloat16;
    a.call.dim = s.dim;
    a.call.scale = log2_scale(scale);
    a.natural_scale = static_cast<float>(scale);
    a.call.mask = m;
    a.call.queries = queries_of(q, b, first, 1, s.queries, s.group());
    a.call.queries.reach = reach.data() + b * s.queries;
    a.call.keys = one_segment(k, v, b, head, keys[b]);
    a.call.out = at(out, b, 0, first);
    a.call.out_stride = {0, out.stride(1), out.stride(2)};
    a.call.lse = lse.mutable_data_ptr<float>() + b * lse.stride(0) + first * lse.stride(2);
    a.call.lse_stride = {0, lse.stride(1), lse.stride(2)};
    a.grad_out = at(grad, b, 0, first);
    a.grad_stride = {0, grad.stride(1), grad.stride(2)};
    if (grad_lse) {
      a.grad_lse =
          grad_lse->const_data_ptr<float>() + b * grad_lse->stride(0) + first * grad_lse->stride(2);
      a.grad_lse_stride = {0, grad_lse->stride(1), grad_lse->stride(2)};
    }
    a.dq = at(dq, b, 0, first);
    a.dq_stride = {0, dq.stride(1), dq.stride(2)};
    return a;
  };
  const auto kernel = RLIR_CPU_KERNEL_AMX(attend_backward);
  const int64_t scratch_bytes = RLIR_CPU_KERNEL_AMX(attend_backward_scratch)(s.bfloat16, s.dim);
  for_tasks(units * shares, scratch_bytes, [&](int64_t task, void* scratch) {
    cpu::AttentionBackward a = call_of(task / shares);
    a.sums.k[0] = dk_sums + task * share;
    a.sums.v[0] = dv_sums + task * share;
    std::fill_n(a.sums.k[0], share, 0.0f);
    std::fill_n(a.sums.v[0], share, 0.0f);
    const std::vector<int64_t> begins = shares_of(a.call.queries, shares);
    kernel(a, begins[task % shares], begins[task % shares + 1], scratch);
  });
  const auto store = RLIR_CPU_KERNEL_AMX(store_key_gradients);
  torch::stable::parallel_for(0, units, 1, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t b = unit / s.kv_heads, head = unit % s.kv_heads;
      store(s.bfloat16, dk_sums + unit * shares * share, shares, share, s.dim,
            static_cast<float>(scale), at(dk, b, 0, head), dk.stride(1), 0, s.keys);
      store(s.bfloat16, dv_sums + unit * shares * share, shares, share, s.dim, 1.0f,
            at(dv, b, 0, head), dv.stride(1), 0, s.keys);
    }
  });
  return {dq, dk, dv};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(rlir, m) {
  m.def(kVideoAttentionSchema, {at::Tag::pt2_compliant_tag});
  m.def(kVideoAttentionBackwardSchema, {at::Tag::pt2_compliant_tag});
}

STABLE_TORCH_LIBRARY_IMPL(rlir, CPU, m) {
  m.impl("video_attention", TORCH_BOX(&video_attention_cpu));
  m.impl("video_attention_backward", TORCH_BOX(&video_attention_backward_cpu));
}

}  // namespace rlir
