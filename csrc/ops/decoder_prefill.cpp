// rlir::_decoder_prefill: prompts through the layers, their keys and values to the caches of
// cpu/decoder.h.
#include <torch/csrc/stable/library.h>

#include <string>

#include "ops/attention_mask.h"
#include "ops/decoder_step.h"

namespace rlir {
namespace {

constexpr int64_t kPrefillRows = 256;

struct Prompts {
  int64_t count, tokens;
  const int64_t *ids, *embeds, *positions, *slots;  // [count][tokens], then [tokens] each
  const float* added;                               // [count][tokens][hidden], or null
  int64_t first;                                    // sequence of the first prompt
  std::vector<int64_t> holes;                       // slots of the prompt that hold nothing
  int64_t end;                                      // slots of the prompt
};

void prefill_prompt(const Policy& p, const DecoderCaches& caches, const AttentionMask& mask,
                    const Prompts& in, int64_t prompt, const Team& team) {
  const cpu::Decoder& m = p.decoder;
  const int64_t sequence = in.first + prompt, group = m.heads / m.kv_heads;
  const int64_t bytes = m.bfloat16 ? 2 : 4;
  for (int64_t layer = 0; layer < m.layers; ++layer) {
    for (int64_t head = 0; head < m.kv_heads; ++head) {
      const cpu::KeySource keys = prompt_keys(m, caches.prompts, layer, sequence, head, 0);
      for (const int64_t slot : in.holes) {  // not seen, but read with their neighbours
        for (const void* x : {keys.k[0], keys.v[0]}) {
          std::fill_n(static_cast<char*>(const_cast<void*>(x)) + slot * m.head_dim * bytes,
                      m.head_dim * bytes, 0);
        }
      }
    }
  }
  const Workspace w(p, std::min(kPrefillRows, in.tokens));
  const Scratch out(std::min(kPrefillRows, in.tokens) * m.hidden * bytes);
  std::vector<Reach> reach;
  for (int64_t first = 0; first < in.tokens; first += kPrefillRows) {
    const int64_t count = std::min(kPrefillRows, in.tokens - first);
    reach.clear();
    for (int64_t i = 0; i < count; ++i) {
      const int64_t t = first + i, at = prompt * in.tokens + t;
      p.embed(in.ids[at], in.embeds[t], in.added == nullptr ? nullptr : in.added + at * m.hidden,
              w.x() + i * w.sizes.x);
      reach.push_back(reach_of(mask, in.slots[t], INT64_MAX));
    }
    const int64_t seen = in.slots[first + count - 1] + 1;
    const int64_t panel = RLIR_CPU_KERNEL_AMX(attention_sizes)(m.bfloat16, m.head_dim).panel;
    const int64_t panels = (count * group + panel - 1) / panel;
    const int64_t together = panels_together(panels, m.kv_heads, team.threads());
    const int64_t parts = (panels + together - 1) / together;
    run_layers(p, w, count, team, [&](int64_t layer) {
      team.each(count, 2, [&](int64_t begin, int64_t end, char* scratch) {
        RLIR_CPU_KERNEL_AMX(decoder_append_rows)
        (m, layer, caches.prompts, sequence, in.positions + first, in.slots + first, w.qkv(), begin,
         end, w.raw(), scratch);
      });
      team.each(m.kv_heads * parts, m.kv_heads * parts,
                [&](int64_t begin, int64_t end, char* scratch) {
                  for (int64_t i = begin; i < end; ++i) {
                    const int64_t head = i / parts, from = i % parts * together;
                    cpu::VideoAttention call =
                        raw_call(m, mask, w.raw(), 0, 1, count, head, reach.data());
                    call.keys = prompt_keys(m, caches.prompts, layer, sequence, head, seen);
                    call.out = out.get<char>() + head * group * m.head_dim * bytes;
                    call.out_stride = call.queries.stride;
                    RLIR_CPU_KERNEL_AMX(attend)
                    (call, from, std::min(together, panels - from), scratch);
                  }
                });
      team.each(count, 2, [&](int64_t begin, int64_t end, char* scratch) {
        RLIR_CPU_KERNEL_AMX(decoder_words)(m, out.get(), begin, end, w.h(), scratch);
      });
    });
  }
  // What is left of whole blocks, by pairs; an odd last slot is each rollout's own.
  const int64_t base = in.end / cpu::kKeyBlock * cpu::kKeyBlock;
  for (int64_t slot = base; slot < in.end / 2 * 2; ++slot) {
    RLIR_CPU_KERNEL_AMX(decoder_place)
    (m, caches.prompts, sequence, slot, caches.tails, sequence, slot - base);
  }
}

void decoder_prefill_cpu(const std::vector<Tensor>& weights, const std::vector<int64_t>& sizes,
                         double eps, const Tensor& ids, const Tensor& embeds,
                         const Tensor& positions, const Tensor& slots,
                         const std::optional<Tensor>& added, std::string mask_kind,
                         std::vector<int64_t> mask_numbers, int64_t first, bool parallel,
                         const Tensor& prompt_k, const Tensor& prompt_v, const Tensor& tail_k,
                         const Tensor& tail_v) {
  const Policy p = policy_of(weights, sizes, eps);
  const AttentionMask mask = attention_mask("decoder", mask_kind, mask_numbers);
  DecoderCaches caches{};
  caches.prompts = rows_of(p, prompt_k, prompt_v);
  caches.tails = cache_of("the tails", p, tail_k, tail_v);
  Prompts in{};
  RLIR_CHECK(ids.dim() == 2, "decoder: ids must be [prompts, tokens], got ", ids.dim(),
             " dimensions");
  in.count = ids.size(0);
  in.tokens = ids.size(1);
  in.first = first;
  in.ids = integers("ids", ids, in.count * in.tokens);
  in.embeds = integers("embeds", embeds, in.tokens);
  in.positions = integers("positions", positions, in.tokens);
  in.slots = integers("slots", slots, in.tokens);
  if (added.has_value()) {
    in.added = floats("what is added", *added, in.count * in.tokens * p.decoder.hidden);
  }
  if (in.count == 0 || in.tokens == 0) return;
  check_below("ids", in.ids, in.count * in.tokens, p.vocabulary);
  check_below("embeds", in.embeds, in.tokens, p.block);
  check_below("positions", in.positions, in.tokens, p.decoder.positions);
  check_below("slots", in.slots, in.tokens, caches.prompts.capacity);
  RLIR_CHECK(first >= 0 && first + in.count <= caches.prompts.sequences &&
                 caches.tails.sequences == caches.prompts.sequences,
             "decoder: there must be a cache for each prompt, got ", caches.prompts.sequences);
  for (int64_t t = 0, next = 0; t < in.tokens; next = in.slots[t++] + 1) {
    RLIR_CHECK(in.slots[t] >= next, "decoder: slots must ascend, got ", in.slots[t]);
    for (int64_t slot = next; slot < in.slots[t]; ++slot) in.holes.push_back(slot);
  }
  in.end = in.slots[in.tokens - 1] + 1;
  const int64_t bytes = Workspace::task_bytes(p, std::min(kPrefillRows, in.tokens));
  if (parallel) {
    const Team team(true, bytes);
    for (int64_t i = 0; i < in.count; ++i) prefill_prompt(p, caches, mask, in, i, team);
    return;
  }
  torch::stable::parallel_for(0, in.count, 1, [&](int64_t begin, int64_t end) {
    const Team team(false, bytes);
    for (int64_t i = begin; i < end; ++i) prefill_prompt(p, caches, mask, in, i, team);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(rlir, m) {
  m.def(
      "_decoder_prefill(Tensor[] weights, int[] sizes, float eps, Tensor ids, Tensor embeds, "
      "Tensor positions, Tensor slots, Tensor? added, str mask, int[] mask_numbers, int first, "
      "bool parallel, Tensor(a!) prompt_k, Tensor(b!) prompt_v, Tensor(c!) tail_k, "
      "Tensor(d!) tail_v) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(rlir, CPU, m) {
  m.impl("_decoder_prefill", TORCH_BOX(&decoder_prefill_cpu));
}

}  // namespace rlir
