// rlir::group_decode_attention: CPU dispatch. Passes: cpu/group_decode_attention.h.
#include "ops/group_decode_attention.h"

#include <torch/csrc/stable/library.h>

#include <initializer_list>

#include "core/cpu_isa.h"
#include "core/scratch.h"
#include "cpu/group_decode_attention.h"
#include "ops/attention_call.h"

namespace rlir {
namespace {

using torch::stable::Tensor;

constexpr const char* kOp = "group_decode_attention";

// How many key heads go together: those whose rows lie beside each other, as long as each thread
// has tasks to choose from and two blocks of such rows stay in a second level cache.
int64_t heads_together(std::initializer_list<const HeadRows*> keys, const AttentionShape& s,
                       int64_t threads) {
  for (const HeadRows* x : keys) {
    if (x->stride[2] != s.dim) return 1;
  }
  constexpr int64_t kRowBytes = 1024;
  const int64_t most = std::max<int64_t>(1, kRowBytes / (s.dim * (s.bfloat16 ? 2 : 4)));
  int64_t together = std::min<int64_t>({cpu::kHeadsTogether, s.kv_heads, most});
  while (together > 1 && s.batch * ((s.kv_heads + together - 1) / together) < 2 * threads) {
    together /= 2;
  }
  return together;
}

Tensor group_decode_attention_cpu(const Tensor& q_in, const Tensor& prefix_k_in,
                                  const Tensor& prefix_v_in, const Tensor& suffix_k_in,
                                  const Tensor& suffix_v_in, const Tensor& prefix_lengths,
                                  const Tensor& suffix_lengths,
                                  const std::optional<Tensor>& q_positions, std::string mask,
                                  std::vector<int64_t> mask_numbers, int64_t group_size,
                                  double scale) {
  const AttentionShape s = attention_shape(kOp, q_in, suffix_k_in, suffix_v_in);
  RLIR_CHECK(group_size >= 1 && s.batch % group_size == 0, kOp, ": q must hold whole groups, got ",
             s.batch, " rollouts in groups of ", group_size);
  const int64_t groups = s.batch / group_size;
  check_part(kOp, "prefix", prefix_k_in, prefix_v_in, groups, s);
  const Tensor kept[] = {attention_rows(kOp, "q", q_in, q_in),
                         attention_rows(kOp, "prefix_k", prefix_k_in, q_in),
                         attention_rows(kOp, "prefix_v", prefix_v_in, q_in),
                         attention_rows(kOp, "suffix_k", suffix_k_in, q_in),
                         attention_rows(kOp, "suffix_v", suffix_v_in, q_in)};
  Tensor result = torch::stable::new_empty(kept[0], {s.batch, s.queries, s.heads, s.dim});
  if (result.numel() == 0) return result;
  const HeadRows q(kept[0]), pk(kept[1]), pv(kept[2]), sk(kept[3]), sv(kept[4]), out(result);
  const AttentionMask m = attention_mask(kOp, mask, mask_numbers);
  const auto prefix =
      attention_lengths(kOp, "prefix_lengths", prefix_lengths, groups, prefix_k_in.size(1));
  const auto suffix = attention_lengths(kOp, "suffix_lengths", suffix_lengths, s.batch, s.keys);
  std::vector<int64_t> keys(s.batch);
  for (int64_t r = 0; r < s.batch; ++r) keys[r] = prefix[r / group_size] + suffix[r];
  const auto reach = attention_reach(kOp, m, q_positions, std::vector<int64_t>(s.batch, s.queries),
                                     keys, s.queries);

  const cpu::AttentionSizes sizes = RLIR_CPU_KERNEL_AMX(attention_sizes)(s.bfloat16, s.dim);
  const int64_t lanes = s.queries * s.group();  // of a rollout and key head
  const auto panels_of = [&](int64_t n) { return (n + sizes.panel - 1) / sizes.panel; };
  // Whole blocks of the prefix, where there is somebody to share them with.
  const auto shared_blocks = [&](int64_t group) {
    return group_size > 1 ? prefix[group] / cpu::kKeyBlock : 0;
  };
  const auto call_of = [&](int64_t group, int64_t first, int64_t members, int64_t head) {
    cpu::VideoAttention a{};
    a.bfloat16 = s.bfloat16;
    a.dim = s.dim;
    a.scale = log2_scale(scale);
    a.mask = m;
    a.queries = queries_of(q, first, head * s.group(), members, s.queries, s.group());
    a.queries.reach = reach.data() + first * s.queries;
    a.keys = one_segment(pk, pv, group, head, prefix[group]);
    a.out = out.at(first, 0, head * s.group());
    a.out_stride = {out.stride[0], out.stride[1], out.stride[2]};
    return a;
  };
  const int64_t state_size = cpu::decode_state(s.dim);
  const Scratch states(group_size > 1 ? s.batch * s.kv_heads * lanes * state_size * 4 : 0);
  // [group][head][member][lane]
  const auto state_of = [&](int64_t group, int64_t head, int64_t member) {
    return states.get<float>() +
           (((group * s.kv_heads + head) * group_size + member) * lanes) * state_size;
  };
  const int64_t panels = panels_of(lanes), group_panels = panels_of(group_size * lanes);
  // Calls run(unit, first panel, panels, scratch).
  const auto each = [&](int64_t units, int64_t count, const auto& run) {
    const int64_t together = panels_together(count, units, all_threads());
    const int64_t parts = (count + together - 1) / together;
    for_tasks(units * parts, sizes.scratch, [&](int64_t task, void* scratch) {
      const int64_t first = task % parts * together;
      run(task / parts, first, std::min(together, count - first), scratch);
    });
  };
  if (group_size > 1) {
    const auto kernel = RLIR_CPU_KERNEL_AMX(decode_prefix);
    each(groups * s.kv_heads, group_panels,
         [&](int64_t unit, int64_t first, int64_t count, void* scratch) {
           const int64_t group = unit / s.kv_heads, head = unit % s.kv_heads;
           const int64_t blocks = shared_blocks(group);
           if (blocks == 0) return;
           kernel(call_of(group, group * group_size, group_size, head), first, count, blocks,
                  state_of(group, head, 0), scratch);
         });
  }
  const auto kernel = RLIR_CPU_KERNEL_AMX(decode_suffix);
  const auto own_call_of = [&](int64_t row, int64_t head) {
    cpu::VideoAttention a = call_of(row / group_size, row, 1, head);
    a.keys = two_segments(a.keys, one_segment(sk, sv, row, head, suffix[row]));
    return a;
  };
  const int64_t threads = all_threads();
  // Key heads a task.
  const int64_t heads = panels > 1 ? 1 : heads_together({&pk, &pv, &sk, &sv}, s, threads);
  const int64_t head_tasks = (s.kv_heads + heads - 1) / heads, units = s.batch * head_tasks;
  const auto heads_from = [&](int64_t head) { return std::min(heads, s.kv_heads - head); };
  // The first block of what the thread of a unit may well go on with; nothing if `heads` is 0.
  const auto after_of = [&](int64_t unit) {
    cpu::KeysAfter after{};
    const int64_t next = unit + threads;
    if (panels > 1 || next >= units) return after;
    const int64_t row = next / head_tasks, head = next % head_tasks * heads;
    const auto [low, high] = blocks_seen(reach.data() + row * s.queries, s.queries);
    const int64_t block = std::max(low, shared_blocks(row / group_size));
    if (block >= high) return after;
    return cpu::KeysAfter{own_call_of(row, head).keys, block * cpu::kKeyBlock, heads_from(head)};
  };
  each(units, panels, [&](int64_t unit, int64_t first, int64_t count, void* scratch) {
    const int64_t row = unit / head_tasks, head = unit % head_tasks * heads;
    const int64_t some = heads_from(head), group = row / group_size;
    cpu::VideoAttention calls[cpu::kHeadsTogether];
    for (int64_t i = 0; i < some; ++i) calls[i] = own_call_of(row, head + i);
    const float* state = group_size > 1 ? state_of(group, head, row % group_size) : nullptr;
    const cpu::KeysAfter after = after_of(unit);
    kernel(
        {calls, some, state, group_size * lanes * state_size, after.heads > 0 ? &after : nullptr},
        first, count, shared_blocks(group), scratch);
  });
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(rlir, m) {
  m.def(kGroupDecodeAttentionSchema, {at::Tag::pt2_compliant_tag});
}

STABLE_TORCH_LIBRARY_IMPL(rlir, CPU, m) {
  m.impl("group_decode_attention", TORCH_BOX(&group_decode_attention_cpu));
}

}  // namespace rlir
