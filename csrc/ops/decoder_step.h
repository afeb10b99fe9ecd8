// The decoder's phases (cpu/decoder.h) strung together: all layers for the rows of a step, on one
// thread or on all. Which it is changes no bit.
#pragma once

#include <algorithm>
#include <vector>

#include "core/scratch.h"
#include "core/seen_bits.h"
#include "cpu/group_decode_attention.h"
#include "ops/attention_call.h"
#include "ops/decoder.h"
#include "ops/team.h"

namespace rlir {

// A Decoder and the embeddings in front of it.
struct Policy {
  cpu::Decoder decoder{};
  const float *tokens = nullptr, *slots = nullptr;  // [vocabulary][x], [block][x] or null
  int64_t vocabulary = 0, block = 0, image = 0;     // image: visual tokens a frame
  cpu::DecoderSizes sizes{};                        // of no rows and no capacity

  int64_t action() const { return block - image; }
  cpu::DecoderSizes sizes_of(int64_t rows, int64_t capacity) const {
    return RLIR_CPU_KERNEL_AMX(decoder_sizes)(decoder, rows, capacity);
  }
  int64_t panels(cpu::DecoderProduct which) const {
    using cpu::DecoderProduct;
    const cpu::Decoder& m = decoder;
    const int64_t outputs = which == DecoderProduct::kQkv ? (m.heads + 2 * m.kv_heads) * m.head_dim
                            : which == DecoderProduct::kMlp  ? m.mlp
                            : which == DecoderProduct::kHead ? m.codes
                                                             : m.hidden;
    return (outputs + sizes.panel - 1) / sizes.panel;
  }
  // x = embeddings of a token at a slot of its block, and what the stem says, or null.
  void embed(int64_t token, int64_t slot, const float* stem, float* x) const {
    const float* t = tokens + token * sizes.x;
    for (int64_t i = 0; i < sizes.x; ++i) x[i] = t[i];
    for (int64_t i = 0; slots != nullptr && i < sizes.x; ++i) x[i] += slots[slot * sizes.x + i];
    for (int64_t i = 0; stem != nullptr && i < decoder.hidden; ++i) x[i] += stem[i];
  }
};

// Weights in the order of engine.py; sizes: hidden, layers, heads, kv_heads, mlp, codes,
// vocabulary, image, block, positions, bfloat16.
Policy policy_of(const std::vector<Tensor>& weights, const std::vector<int64_t>& sizes, double eps);
// k and v with slots as lanes, of one shape for all builds of a format.
cpu::DecoderCache cache_of(const char* name, const Policy& p, const Tensor& k, const Tensor& v);
// k and v as rows.
cpu::DecoderRows rows_of(const Policy& p, const Tensor& k, const Tensor& v);

// Rollouts next to each other that continue one prompt, with as many rows each.
struct GroupRun {
  int64_t prompt, blocks;  // whole blocks of the prompt
  int64_t member, members, tokens;
};

// The rows of a step. Those of a member follow each other.
struct StepRows {
  std::vector<cpu::DecoderRow> rows;
  std::vector<Reach> reach;
  std::vector<uint64_t> seen;
  std::vector<cpu::DecoderMember> members;
  std::vector<GroupRun> runs;

  void clear() {
    rows.clear();
    reach.clear();
    seen.clear();
    members.clear();
    runs.clear();
  }
  int64_t count() const { return static_cast<int64_t>(rows.size()); }

  // What rows see, for all layers, once all rows are there. Members that stand alike, as those of a
  // group do, share it.
  void finish(const AttentionMask& mask) {
    std::vector<int64_t> begins;
    for (size_t i = 0; i < members.size(); ++i) {
      cpu::DecoderMember& member = members[i];
      member.reach = reach.data() + member.first;
      if (i > 0 && alike(members[i - 1], member)) {
        member.words = members[i - 1].words;
        begins.push_back(begins.back());
        continue;
      }
      int64_t high = member.base;
      for (int64_t j = 0; j < member.count; ++j) high = std::max(high, member.reach[j].high);
      member.words = (high - member.base + cpu::kKeyBlock - 1) / cpu::kKeyBlock * kBlockWords;
      begins.push_back(static_cast<int64_t>(seen.size()));
      for (int64_t j = 0; j < member.count; ++j) {
        seen.resize(seen.size() + member.words);
        seen_bits(mask, member.reach[j], member.base, member.words,
                  seen.data() + seen.size() - member.words);
      }
    }
    for (size_t i = 0; i < members.size(); ++i) members[i].seen = seen.data() + begins[i];
  }

 private:
  static constexpr int64_t kBlockWords = cpu::kKeyBlock / 64;

  static bool alike(const cpu::DecoderMember& a, const cpu::DecoderMember& b) {
    return a.base == b.base && a.count == b.count &&
           std::equal(a.reach, a.reach + a.count, b.reach, [](const Reach& x, const Reach& y) {
             return x.low == y.low && x.high == y.high && x.own == y.own && x.tau == y.tau;
           });
  }
};

// Work space of up to `rows` rows.
class Workspace {
 public:
  Workspace(const Policy& p, int64_t rows)
      : sizes(p.sizes_of(rows, 0)),
        padded(round_up(rows, sizes.row_pad)),
        x_(rows * sizes.x * 4),
        h_(padded * sizes.x * 4),
        a_(padded * sizes.a * 4),
        qkv_(rows * sizes.qkv * 4),
        q_(rows * sizes.q * 4),
        raw_(rows * sizes.x * 4),
        merged_(rows * sizes.x * 4),
        states_(rows * p.decoder.heads * sizes.state * 4) {
    std::fill_n(merged(), rows * sizes.x, 0.0f);  // its pads stay zero
  }

  // Bytes of `rows` rows.
  static int64_t bytes(const Policy& p, int64_t rows) {
    const cpu::DecoderSizes s = p.sizes_of(rows, 0);
    return 4 * (rows * (4 * s.x + s.qkv + s.q + p.decoder.heads * s.state) +
                round_up(rows, s.row_pad) * (s.x + s.a));
  }
  // Bytes of a task's scratch.
  static int64_t task_bytes(const Policy& p, int64_t rows) {
    const cpu::DecoderSizes s = p.sizes_of(rows, 0);
    const auto panel = RLIR_CPU_KERNEL_AMX(attention_sizes)(p.decoder.bfloat16, p.decoder.head_dim);
    return std::max({s.product * 4, s.attend * 4, panel.scratch, s.x * 4 + 4096});
  }

  float* x() const { return x_.get<float>(); }
  void* h() const { return h_.get(); }
  void* a() const { return a_.get(); }
  float* qkv() const { return qkv_.get<float>(); }
  void* q() const { return q_.get(); }
  void* raw() const { return raw_.get(); }
  float* merged() const { return merged_.get<float>(); }
  float* states() const { return states_.get<float>(); }

  const cpu::DecoderSizes sizes;
  const int64_t padded;

 private:
  Scratch x_, h_, a_, qkv_, q_, raw_, merged_, states_;
};

// Calls run(begin, end, next, scratch) for the panels of a product; `then` is the product after it.
template <typename Run>
void split_product(const Policy& p, cpu::DecoderProduct which, const Team& team,
                   cpu::DecoderProduct then, int64_t then_layer, const Run& run) {
  const auto panel = RLIR_CPU_KERNEL_AMX(decoder_panel);
  team.split(p.panels(which), [&](int64_t begin, int64_t end, int64_t last_of, char* scratch) {
    const void* next = nullptr;
    if (last_of >= 0) {
      next = panel(p.decoder, then, then_layer, team.first(p.panels(then), last_of));
    }
    run(begin, end, next, scratch);
  });
}

// One pass of `count` rows of w.x() through all layers; attend(layer) reads w.qkv() and writes the
// attention's results as activations to w.h().
template <typename Attend>
void run_layers(const Policy& p, const Workspace& w, int64_t count, const Team& team,
                const Attend& attend) {
  using cpu::DecoderProduct;
  const cpu::Decoder& m = p.decoder;
  const auto multiply = RLIR_CPU_KERNEL_AMX(decoder_multiply);
  const auto norm = [&](const float* weight) {
    const auto kernel = RLIR_CPU_KERNEL_AMX(decoder_norm);
    if (count < 64) return kernel(m, weight, w.x(), 0, count, w.h());  // less than a thread's start
    team.each(count, 4, [&](int64_t begin, int64_t end, char*) {
      kernel(m, weight, w.x(), begin, end, w.h());
    });
  };
  const auto product = [&](DecoderProduct which, int64_t layer, const void* from, void* to,
                           DecoderProduct then, int64_t then_layer) {
    split_product(p, which, team, then, then_layer,
                  [&](int64_t begin, int64_t end, const void* next, char* scratch) {
                    multiply(m, which, layer, from, count, begin, end, next, to, scratch);
                  });
  };
  for (int64_t layer = 0; layer < m.layers; ++layer) {
    const float* norms = m.norms + 2 * layer * w.sizes.x;
    norm(norms);
    product(DecoderProduct::kQkv, layer, w.h(), w.qkv(), DecoderProduct::kOut, layer);
    attend(layer);
    product(DecoderProduct::kOut, layer, w.h(), w.x(), DecoderProduct::kMlp, layer);
    norm(norms + w.sizes.x);
    product(DecoderProduct::kMlp, layer, w.h(), w.a(), DecoderProduct::kDown, layer);
    const bool ends = layer + 1 == m.layers;
    product(DecoderProduct::kDown, layer, w.a(), w.x(),
            ends ? DecoderProduct::kHead : DecoderProduct::kQkv, ends ? 0 : layer + 1);
  }
}

struct DecoderCaches {
  cpu::DecoderRows prompts;      // whole blocks are read from here
  cpu::DecoderCache tails, own;  // [prompts] of 128 slots, [rollouts]
};

// Head `head` of a sequence of rows as an attention op's keys.
inline cpu::KeySource prompt_keys(const cpu::Decoder& m, const cpu::DecoderRows& cache,
                                  int64_t layer, int64_t sequence, int64_t head, int64_t count) {
  const int64_t bytes = m.bfloat16 ? 2 : 4;
  const int64_t at = ((layer * cache.sequences + sequence) * m.kv_heads + head) * cache.capacity *
                     m.head_dim * bytes;
  cpu::KeySource keys{};
  keys.k[0] = static_cast<const char*>(cache.k) + at;
  keys.v[0] = static_cast<const char*>(cache.v) + at;
  keys.k_stride[0] = keys.v_stride[0] = m.head_dim;
  keys.count[0] = count;
  return keys;
}

// Rows of rollouts [members][tokens] in w.raw() as an attention op's call for key head `head`.
inline cpu::VideoAttention raw_call(const cpu::Decoder& m, const AttentionMask& mask, void* raw,
                                    int64_t first_row, int64_t members, int64_t tokens,
                                    int64_t head, const Reach* reach) {
  const int64_t group = m.heads / m.kv_heads, bytes = m.bfloat16 ? 2 : 4, row = m.hidden;
  cpu::VideoAttention a{};
  a.bfloat16 = m.bfloat16;
  a.dim = m.head_dim;
  a.scale = log2_scale(1.0 / std::sqrt(static_cast<double>(m.head_dim)));
  a.mask = mask;
  a.queries = {static_cast<char*>(raw) + (first_row * row + head * group * m.head_dim) * bytes,
               members,
               tokens,
               group,
               {tokens * row, row, m.head_dim},
               reach};
  return a;
}

// All layers for a step of rollouts: w.x() in place.
inline void run_step(const Policy& p, const DecoderCaches& caches, const AttentionMask& mask,
                     const StepRows& step, const Workspace& w, const Team& team) {
  const cpu::Decoder& m = p.decoder;
  const int64_t count = step.count(), group = m.heads / m.kv_heads;
  const int64_t members = static_cast<int64_t>(step.members.size());
  bool shares = false;
  for (const GroupRun& run : step.runs) shares = shares || run.blocks > 0;
  const int64_t panel = RLIR_CPU_KERNEL_AMX(attention_sizes)(m.bfloat16, m.head_dim).panel;
  // Tasks of the pass over whole blocks: panels of a (run, key head).
  struct PanelTask {
    int64_t run, head, first, count;
  };
  std::vector<PanelTask> panels;
  std::vector<int64_t> run_of(step.members.size());
  for (size_t r = 0; r < step.runs.size(); ++r) {
    const GroupRun& run = step.runs[r];
    for (int64_t i = 0; i < run.members; ++i) run_of[run.member + i] = static_cast<int64_t>(r);
    const int64_t all = (run.members * run.tokens * group + panel - 1) / panel;
    const int64_t together = panels_together(all, m.kv_heads, team.threads());
    for (int64_t head = 0; run.blocks > 0 && head < m.kv_heads; ++head) {
      for (int64_t i = 0; i < all; i += together) {
        panels.push_back({static_cast<int64_t>(r), head, i, std::min(together, all - i)});
      }
    }
  }
  // [run][head][member][row][query], a run's beginning where its rows do.
  const auto state_of = [&](const GroupRun& run, int64_t head, int64_t member) {
    const int64_t before = step.members[run.member].first * m.heads;
    const int64_t lane = (head * run.members + member) * run.tokens * group;
    return w.states() + (before + lane) * w.sizes.state;
  };
  run_layers(p, w, count, team, [&](int64_t layer) {
    // Whole rollouts: two slots share a word of values.
    team.each(members, 2, [&](int64_t begin, int64_t end, char* scratch) {
      const cpu::DecoderMember& last = step.members[end - 1];
      RLIR_CPU_KERNEL_AMX(decoder_append)
      (m, layer, caches.own, step.rows.data(), w.qkv(), step.members[begin].first,
       last.first + last.count, w.q(), shares ? w.raw() : nullptr, scratch);
    });
    const int64_t tasks = static_cast<int64_t>(panels.size());
    team.each(tasks, tasks, [&](int64_t begin, int64_t end, char* scratch) {
      for (int64_t i = begin; i < end; ++i) {
        const GroupRun& run = step.runs[panels[i].run];
        const int64_t first = step.members[run.member].first, head = panels[i].head;
        cpu::VideoAttention call = raw_call(m, mask, w.raw(), first, run.members, run.tokens, head,
                                            step.reach.data() + first);
        call.keys =
            prompt_keys(m, caches.prompts, layer, run.prompt, head, run.blocks * cpu::kKeyBlock);
        RLIR_CPU_KERNEL_AMX(decode_prefix)
        (call, panels[i].first, panels[i].count, run.blocks, state_of(run, head, 0), scratch);
      }
    });
    team.each(members * m.kv_heads, 4, [&](int64_t begin, int64_t end, char* scratch) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t member = i / m.kv_heads, head = i % m.kv_heads;
        const GroupRun& run = step.runs[run_of[member]];
        RLIR_CPU_KERNEL_AMX(decoder_attend)
        (m, layer, caches.tails, caches.own, step.members[member], head, w.q(),
         run.blocks > 0 ? state_of(run, head, member - run.member) : nullptr, w.merged(), scratch);
      }
    });
    RLIR_CPU_KERNEL_AMX(decoder_round)(m, w.merged(), 0, count, w.h());
  });
}

}  // namespace rlir
