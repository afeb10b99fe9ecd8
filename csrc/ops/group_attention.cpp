// rlir::group_attention and its backward: CPU dispatch, on the kernels of video_attention. A group
// is a sequence of parts that share its prefix: the prefix itself, then each member's suffix, whose
// keys are two segments.
#include "ops/group_attention.h"

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

constexpr const char* kOp = "group_attention";

// Tensors as kernels want them.
struct Group {
  Tensor q[2], k[2], v[2];  // prefix, suffix
  AttentionShape shape;     // of the suffixes
  int64_t groups, size, prefix;
  AttentionMask mask;
  float scale, natural_scale;
  std::vector<Reach> reach[2];  // of one prefix, of one suffix

  int64_t parts() const { return size + 1; }
  int64_t tokens(int64_t part) const { return part == 0 ? prefix : shape.queries; }
  int64_t row(int64_t group, int64_t part) const {
    return part == 0 ? group : group * size + part - 1;
  }
};

Group group_of(const Tensor& q_prefix, const Tensor& k_prefix, const Tensor& v_prefix,
               const Tensor& q_suffix, const Tensor& k_suffix, const Tensor& v_suffix,
               int64_t group_size, const std::string& mask,
               const std::vector<int64_t>& mask_numbers, double scale) {
  const AttentionShape s = attention_shape(kOp, q_suffix, k_suffix, v_suffix);
  RLIR_CHECK(s.queries == s.keys, kOp, ": a suffix must have a key a query, got ", s.keys, " and ",
             s.queries);
  RLIR_CHECK(group_size >= 1 && s.batch % group_size == 0, kOp,
             ": q_suffix must hold whole groups, got ", s.batch, " rollouts in groups of ",
             group_size);
  const int64_t groups = s.batch / group_size;
  check_part(kOp, "prefix", k_prefix, v_prefix, groups, s);
  const int64_t prefix = k_prefix.size(1);
  RLIR_CHECK(q_prefix.dim() == 4 && q_prefix.size(0) == groups && q_prefix.size(1) == prefix &&
                 q_prefix.size(2) == s.heads && q_prefix.size(3) == s.dim,
             kOp, ": q_prefix must be [", groups, ", ", prefix, ", ", s.heads, ", ", s.dim,
             "], got otherwise");
  Group g{{attention_rows(kOp, "q_prefix", q_prefix, q_suffix),
           attention_rows(kOp, "q_suffix", q_suffix, q_suffix)},
          {attention_rows(kOp, "k_prefix", k_prefix, q_suffix),
           attention_rows(kOp, "k_suffix", k_suffix, q_suffix)},
          {attention_rows(kOp, "v_prefix", v_prefix, q_suffix),
           attention_rows(kOp, "v_suffix", v_suffix, q_suffix)},
          s,
          groups,
          group_size,
          prefix,
          attention_mask(kOp, mask, mask_numbers),
          log2_scale(scale),
          static_cast<float>(scale),
          {}};
  g.reach[0] = attention_reach(kOp, g.mask, std::nullopt, {prefix}, {prefix}, prefix);
  g.reach[1] =
      attention_reach(kOp, g.mask, std::nullopt, {s.queries}, {prefix + s.queries}, s.queries);
  return g;
}

// The call of a part of a group for a key head; results go to `out` and `lse`, one of each kind.
cpu::VideoAttention call_of(const Group& g, int64_t group, int64_t part, int64_t head,
                            const Tensor* out, const Tensor* lse) {
  const int kind = part > 0;
  const int64_t row = g.row(group, part), first = head * g.shape.group();
  cpu::VideoAttention a{};
  a.bfloat16 = g.shape.bfloat16;
  a.dim = g.shape.dim;
  a.scale = g.scale;
  a.mask = g.mask;
  a.queries = queries_of(g.q[kind], row, first, 1, g.tokens(part), g.shape.group());
  a.queries.reach = g.reach[kind].data();
  a.keys = one_segment(g.k[0], g.v[0], group, head, g.prefix);
  if (kind == 1) {
    a.keys = two_segments(a.keys, one_segment(g.k[1], g.v[1], row, head, g.shape.keys));
  }
  a.out = at(out[kind], row, 0, first);
  a.out_stride = {0, out[kind].stride(1), out[kind].stride(2)};
  a.lse = lse[kind].mutable_data_ptr<float>() + row * lse[kind].stride(0) + first;
  a.lse_stride = {0, lse[kind].stride(1), 1};
  return a;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> group_attention_cpu(
    const Tensor& q_prefix, const Tensor& k_prefix, const Tensor& v_prefix, const Tensor& q_suffix,
    const Tensor& k_suffix, const Tensor& v_suffix, int64_t group_size, std::string mask,
    std::vector<int64_t> mask_numbers, double scale) {
  const Group g = group_of(q_prefix, k_prefix, v_prefix, q_suffix, k_suffix, v_suffix, group_size,
                           mask, mask_numbers, scale);
  const AttentionShape& s = g.shape;
  Tensor out[2] = {torch::stable::new_empty(g.q[0], {g.groups, g.prefix, s.heads, s.dim}),
                   torch::stable::new_empty(g.q[1], {s.batch, s.queries, s.heads, s.dim})};
  Tensor lse[2] = {
      torch::stable::new_empty(g.q[0], {g.groups, g.prefix, s.heads}, ScalarType::Float),
      torch::stable::new_empty(g.q[1], {s.batch, s.queries, s.heads}, ScalarType::Float)};
  const cpu::AttentionSizes sizes = RLIR_CPU_KERNEL_AMX(attention_sizes)(s.bfloat16, s.dim);
  const auto panels_of = [&](int64_t tokens) {
    return (tokens * s.group() + sizes.panel - 1) / sizes.panel;
  };
  const int64_t panels[2] = {panels_of(g.prefix), panels_of(s.queries)};
  // Of a unit: the prefix's blocks, then each member's, from the one on in which the prefix ends.
  const int64_t shared = blocks_of(g.prefix), border = g.prefix / cpu::kKeyBlock,
                own = blocks_of(g.prefix + s.queries) - border;
  const Packing packing(g.groups * s.kv_heads, s.queries > 0 ? panels[1] : panels[0],
                        shared + g.size * own, sizes);
  const auto unit_call = [&](int64_t unit, int64_t part) {
    return call_of(g, unit / s.kv_heads, part, unit % s.kv_heads, out, lse);
  };
  const auto kernel = RLIR_CPU_KERNEL_AMX(attend);
  packing.each([&](int64_t begin, int64_t units, char* packed) {
    packing.pack(begin, units, packed, [&](int64_t unit, int64_t index) {
      if (index < shared) return std::pair(unit_call(unit, 0), index);
      index -= shared;
      return std::pair(unit_call(unit, 1 + index / own), border + index % own);
    });
    const int64_t together = packing.together(units);
    const auto tasks_of = [&](int kind) { return (panels[kind] + together - 1) / together; };
    const int64_t later = tasks_of(1), a_unit = tasks_of(0) + g.size * later;
    for_tasks(units * a_unit, sizes.scratch, [&](int64_t task, void* scratch) {
      const int64_t unit = task / a_unit, index = a_unit - 1 - task % a_unit;
      const int64_t beyond = index - tasks_of(0), part = beyond < 0 ? 0 : 1 + beyond / later;
      cpu::VideoAttention a = unit_call(begin + unit, part);
      if (packed != nullptr) {
        const char* first = packed + unit * packing.bytes();
        const char* second = first + (shared + (part - 1) * own) * sizes.packed;
        a.packed = part == 0 ? cpu::PackedKeys{{first, nullptr}, INT64_MAX}
                             : cpu::PackedKeys{{first, second}, border};
      }
      const int64_t panel = (beyond < 0 ? index : beyond % later) * together;
      kernel(a, panel, std::min(together, panels[part > 0] - panel), scratch);
    });
  });
  return {out[0], lse[0], out[1], lse[1]};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> group_attention_backward_cpu(
    const std::optional<Tensor>& grad_out_prefix, const std::optional<Tensor>& grad_out_suffix,
    const Tensor& q_prefix, const Tensor& k_prefix, const Tensor& v_prefix, const Tensor& q_suffix,
    const Tensor& k_suffix, const Tensor& v_suffix, const Tensor& out_prefix,
    const Tensor& lse_prefix, const Tensor& out_suffix, const Tensor& lse_suffix,
    int64_t group_size, std::string mask, std::vector<int64_t> mask_numbers, double scale) {
  const Group g = group_of(q_prefix, k_prefix, v_prefix, q_suffix, k_suffix, v_suffix, group_size,
                           mask, mask_numbers, scale);
  const AttentionShape& s = g.shape;
  const Tensor out[2] = {out_prefix, out_suffix}, lse[2] = {lse_prefix, lse_suffix};
  std::optional<Tensor> grad[2];
  AttentionShape shapes[2] = {s, s};
  shapes[0].batch = g.groups;
  shapes[0].queries = g.prefix;
  for (int i = 0; i < 2; ++i) {
    const std::optional<Tensor>& given = i == 0 ? grad_out_prefix : grad_out_suffix;
    if (!given) continue;
    grad[i] = attention_rows(kOp, "the gradient", *given, q_suffix);
    check_results(kOp, shapes[i], *grad[i], std::nullopt, out[i], lse[i]);
  }
  Tensor dq[2], dk[2], dv[2];
  for (int i = 0; i < 2; ++i) {
    const int64_t rows = shapes[i].batch, tokens = shapes[i].queries;
    dq[i] = torch::stable::new_empty(g.q[i], {rows, tokens, s.heads, s.dim});
    dk[i] = torch::stable::new_empty(g.q[i], {rows, tokens, s.kv_heads, s.dim});
    dv[i] = torch::stable::new_empty(g.q[i], {rows, tokens, s.kv_heads, s.dim});
    if (!grad[i]) torch::stable::zero_(dq[i]);
  }
  // Shares of a group's parts, each with sums of its own for the prefix.
  const int64_t units = g.groups * s.kv_heads, stride = cpu::attention_stride(s.dim);
  const int64_t shares = std::min(shares_for(units), g.parts());
  const int64_t shared = g.prefix * stride, own = s.keys * stride;
  const Scratch sums(2 * units * (shares * shared + g.size * own) * 4);
  const auto sum_of = [&](int64_t kind, int64_t unit, int64_t share, int64_t member) {
    float* base = sums.get<float>() + (kind * units + unit) * (shares * shared + g.size * own);
    return share >= 0 ? base + share * shared : base + shares * shared + member * own;
  };
  const auto kernel = RLIR_CPU_KERNEL_AMX(attend_backward);
  const int64_t scratch_bytes = RLIR_CPU_KERNEL_AMX(attend_backward_scratch)(s.bfloat16, s.dim);
  for_tasks(units * shares, scratch_bytes, [&](int64_t task, void* scratch) {
    const int64_t unit = task / shares, share = task % shares;
    const int64_t group = unit / s.kv_heads, head = unit % s.kv_heads, first = head * s.group();
    for (int64_t kind = 0; kind < 2; ++kind) {
      std::fill_n(sum_of(kind, unit, share, -1), shared, 0.0f);
    }
    for (int64_t part = g.parts() * share / shares; part < g.parts() * (share + 1) / shares;
         ++part) {
      const int kind = part > 0;
      if (kind == 1) {
        for (int64_t i = 0; i < 2; ++i) std::fill_n(sum_of(i, unit, -1, part - 1), own, 0.0f);
      }
      if (!grad[kind]) continue;
      const int64_t row = g.row(group, part);
      cpu::AttentionBackward a{};
      a.call = call_of(g, group, part, head, out, lse);
      a.natural_scale = g.natural_scale;
      a.grad_out = at(*grad[kind], row, 0, first);
      a.grad_stride = {0, grad[kind]->stride(1), grad[kind]->stride(2)};
      a.dq = at(dq[kind], row, 0, first);
      a.dq_stride = {0, dq[kind].stride(1), dq[kind].stride(2)};
      a.sums.k[0] = sum_of(0, unit, share, -1);
      a.sums.v[0] = sum_of(1, unit, share, -1);
      if (kind == 1) {
        a.sums.k[1] = sum_of(0, unit, -1, part - 1);
        a.sums.v[1] = sum_of(1, unit, -1, part - 1);
      }
      kernel(a, 0, (a.call.queries.lanes() + cpu::kWidePanel - 1) / cpu::kWidePanel, scratch);
    }
  });
  const auto store = RLIR_CPU_KERNEL_AMX(store_key_gradients);
  torch::stable::parallel_for(0, units, 1, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t group = unit / s.kv_heads, head = unit % s.kv_heads;
      for (int64_t kind = 0; kind < 2; ++kind) {
        const Tensor* to = kind == 0 ? dk : dv;
        const float factor = kind == 0 ? g.natural_scale : 1.0f;
        store(s.bfloat16, sum_of(kind, unit, 0, -1), shares, shared, s.dim, factor,
              at(to[0], group, 0, head), to[0].stride(1), 0, g.prefix);
        for (int64_t member = 0; member < g.size; ++member) {
          store(s.bfloat16, sum_of(kind, unit, -1, member), 1, 0, s.dim, factor,
                at(to[1], group * g.size + member, 0, head), to[1].stride(1), 0, s.keys);
        }
      }
    }
  });
  return {dq[0], dk[0], dv[0], dq[1], dk[1], dv[1]};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(rlir, m) {
  m.def(kGroupAttentionSchema, {at::Tag::pt2_compliant_tag});
  m.def(kGroupAttentionBackwardSchema, {at::Tag::pt2_compliant_tag});
}

STABLE_TORCH_LIBRARY_IMPL(rlir, CPU, m) {
  m.impl("group_attention", TORCH_BOX(&group_attention_cpu));
  m.impl("group_attention_backward", TORCH_BOX(&group_attention_backward_cpu));
}

}  // namespace rlir
