// rlir::_decoder_*: what rlir/rollout/engine.py is made of. Formulas and layouts: cpu/decoder.h.
// Stream and slots: rlir/models/world_model.py; schedules: rlir/rollout/schedule.py.
#include <torch/csrc/stable/library.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <atomic>
#include <cmath>
#include <string>

#include "cpu/sample_tokens.h"
#include "ops/attention_mask.h"
#include "ops/decoder_step.h"

namespace rlir {
namespace {

constexpr int64_t kUnit = 8;    // rollouts that no two threads share: a tile of every build
constexpr int64_t kChunk = 16;  // rollouts that go through the layers together
constexpr int64_t kPrefillRows = 256;

// Weights in the order of engine.py; sizes: hidden, layers, heads, kv_heads, mlp, codes,
// vocabulary, image, block, positions, bfloat16.
Policy policy_of(const std::vector<Tensor>& w, const std::vector<int64_t>& n, double eps) {
  RLIR_CHECK((w.size() == 10 || w.size() == 14) && n.size() == 11,
             "decoder: there must be 10 weights, or 14 with scales, and 11 sizes, got ", w.size(),
             " and ", n.size());
  for (int i = 0; i < 10; ++i) {
    RLIR_CHECK(n[i] > 0 && n[i] < int64_t{1} << 31, "decoder: sizes must be positive, got ", n[i]);
  }
  Policy p;
  cpu::Decoder& m = p.decoder;
  m.hidden = n[0];
  m.layers = n[1];
  m.heads = n[2];
  m.kv_heads = n[3];
  m.mlp = n[4];
  m.codes = n[5];
  p.vocabulary = n[6];
  p.image = n[7];
  p.block = n[8];
  m.positions = n[9];
  m.bfloat16 = n[10] != 0;
  m.eps = static_cast<float>(eps);
  m.head_dim = m.hidden / m.heads;
  RLIR_CHECK(m.hidden % m.heads == 0 && m.head_dim % 2 == 0 && m.head_dim <= 256 &&
                 m.heads % m.kv_heads == 0,
             "decoder: hidden / heads must be even and at most 256 and heads % kv_heads 0, got ",
             m.hidden, ", ", m.heads, " and ", m.kv_heads);
  RLIR_CHECK(p.image < p.block && p.vocabulary >= m.codes,
             "decoder: a block must hold an action and an image, got ", p.block, " and ", p.image);
  p.sizes = p.sizes_of(0, 0);
  p.tokens = floats("token embeddings", w[0], p.vocabulary * p.sizes.x);
  if (w[1].numel() > 0) p.slots = floats("slot embeddings", w[1], p.block * p.sizes.x);
  m.norms = floats("norms", w[2], m.layers * 2 * p.sizes.x);
  m.last = floats("the last norm", w[3], p.sizes.x);
  m.rotary = floats("the rotary table", w[4], 2 * m.positions * m.head_dim);
  const PackedFormat words(m.bfloat16);
  const auto packed = [&](const char* name, const Tensor& x, int64_t count, int64_t outputs,
                          int64_t depth) {
    if (w.size() == 10 || &x == &w[9]) return words(name, x, count, outputs, depth);
    return words.values(name, x, count, outputs, depth);
  };
  if (w.size() == 14) {
    RLIR_CHECK(m.bfloat16, "decoder: int8 weights must go with bfloat16, got float32");
    const auto scales = [&](const char* name, const Tensor& x, int64_t count, int64_t outputs) {
      return floats(name, x, count * round_up(outputs, words.panel));
    };
    m.scales = {scales("scales of qkv", w[10], m.layers, (m.heads + 2 * m.kv_heads) * m.head_dim),
                scales("scales of o", w[11], m.layers, m.hidden),
                scales("scales of gate and up", w[12], m.layers * 2, m.mlp),
                scales("scales of down", w[13], m.layers, m.hidden)};
    p.sizes = p.sizes_of(0, 0);
  }
  m.qkv = packed("qkv", w[5], m.layers, (m.heads + 2 * m.kv_heads) * m.head_dim, m.hidden);
  m.out = packed("o", w[6], m.layers, m.hidden, m.hidden);
  m.gate_up = packed("gate and up", w[7], m.layers * 2, m.mlp, m.hidden);
  m.down = packed("down", w[8], m.layers, m.hidden, m.mlp);
  m.head = packed("head", w[9], 1, m.codes, m.hidden);
  return p;
}

// k and v of `capacity` slots as lanes, of one shape for all builds of a format.
cpu::DecoderCache cache_of(const char* name, const Policy& p, const Tensor& k, const Tensor& v) {
  RLIR_CHECK(k.dim() == 4 && k.size(0) == p.decoder.layers && k.size(2) == p.decoder.kv_heads &&
                 k.size(3) > 0,
             "decoder: keys of ", name, " must be [layers, sequences, kv heads, words]");
  const int64_t sequences = k.size(1);
  const cpu::DecoderSizes block = p.sizes_of(0, cpu::kKeyBlock);
  const int64_t blocks = k.size(3) / block.keys;
  const ScalarType dtype = block.values_per_word == 2 ? ScalarType::Int : ScalarType::Float;
  for (const Tensor* x : {&k, &v}) {
    const int64_t words = x == &k ? block.keys : block.values;
    RLIR_CHECK(x->is_cpu() && x->is_contiguous() && x->scalar_type() == dtype &&
                   x->numel() == p.decoder.layers * sequences * p.decoder.kv_heads * blocks * words,
               "decoder: ", name, " must be a cache of whole blocks in the format in use, got ",
               x->numel(), " words");
  }
  return {k.mutable_data_ptr(), v.mutable_data_ptr(), sequences, blocks * cpu::kKeyBlock};
}

cpu::DecoderRows rows_of(const Policy& p, const Tensor& k, const Tensor& v) {
  const cpu::Decoder& m = p.decoder;
  const ScalarType dtype = m.bfloat16 ? ScalarType::BFloat16 : ScalarType::Float;
  for (const Tensor* x : {&k, &v}) {
    RLIR_CHECK(x->is_cpu() && x->is_contiguous() && x->scalar_type() == dtype && x->dim() == 5 &&
                   x->size(0) == m.layers && x->size(2) == m.kv_heads && x->size(4) == m.head_dim &&
                   x->numel() == k.numel(),
               "decoder: the prompts' cache must be [layers, prompts, kv heads, slots, d] of the "
               "policy's dtype");
  }
  return {k.mutable_data_ptr(), v.mutable_data_ptr(), k.size(1), k.size(3)};
}

// A step reads all weights and caches, of a cache a few lines a page: with pages of 4 KiB it would
// mostly wait for their addresses. Advice before the first touch; where the system has none,
// nothing happens.
void use_huge_pages(const Tensor& x) {
#if defined(__linux__)
  constexpr uintptr_t kHuge = uintptr_t{1} << 21;
  const auto begin = reinterpret_cast<uintptr_t>(x.mutable_data_ptr());
  const uintptr_t first = (begin + kHuge - 1) / kHuge * kHuge;
  const uintptr_t last = (begin + static_cast<uintptr_t>(x.numel()) * 4) / kHuge * kHuge;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

Tensor decoder_pack_cpu(const Tensor& weight, bool bfloat16) {
  RLIR_CHECK(weight.is_cpu() && weight.dim() == 3,
             "decoder: a weight must be [N, outputs, depth] "
             "on the CPU, got ",
             weight.dim(), " dimensions");
  RLIR_CHECK(weight.scalar_type() == (bfloat16 ? ScalarType::BFloat16 : ScalarType::Float),
             "decoder: a weight must be of the policy's dtype, got dtype ",
             static_cast<int>(weight.scalar_type()));
  const int64_t n = weight.size(0), outputs = weight.size(1), depth = weight.size(2);
  const PackedFormat format(bfloat16);
  const int64_t words = format.words(depth),
                panels = round_up(outputs, format.panel) / format.panel;
  Tensor packed =
      torch::stable::new_empty(weight, {n, panels, words, format.panel}, format.dtype());
  use_huge_pages(packed);
  const int64_t size = bfloat16 ? 2 : 4;
  const auto pack = RLIR_CPU_KERNEL_AMX(decoder_pack);
  for (int64_t i = 0; i < n; ++i) {
    const Matrix one{
        static_cast<const char*>(weight.const_data_ptr()) + i * weight.stride(0) * size,
        bfloat16 ? Dtype::kBFloat16 : Dtype::kFloat32, weight.stride(1), weight.stride(2)};
    pack(one, outputs, depth, bfloat16,
         static_cast<char*>(packed.mutable_data_ptr()) + i * panels * words * format.panel * 4);
  }
  return packed;
}

// Values int8 [N, outputs, depth] where decoder_pack would have their words, a byte each.
Tensor decoder_pack_int8_cpu(const Tensor& values) {
  RLIR_CHECK(values.is_cpu() && values.dim() == 3 && values.is_contiguous() &&
                 values.scalar_type() == ScalarType::Char,
             "decoder: values must be contiguous int8 [N, outputs, depth] on the CPU");
  const PackedFormat format(true);
  const int64_t n = values.size(0), outputs = values.size(1), depth = values.size(2);
  const int64_t words = format.words(depth), per = format.values_per_word,
                panels = round_up(outputs, format.panel) / format.panel;
  Tensor packed = torch::stable::new_empty(values, {n, panels, words, format.panel * per});
  use_huge_pages(packed);
  const auto* from = static_cast<const int8_t*>(values.const_data_ptr());
  auto* to = static_cast<int8_t*>(packed.mutable_data_ptr());
  torch::stable::parallel_for(0, n * panels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      int8_t* panel = to + i * words * format.panel * per;
      std::fill_n(panel, words * format.panel * per, int8_t{0});
      const int64_t first = i % panels * format.panel;
      for (int64_t lane = 0; lane < std::min(format.panel, outputs - first); ++lane) {
        const int8_t* row = from + (i / panels * outputs + first + lane) * depth;
        for (int64_t k = 0; k < depth; ++k) {
          // Where a word is a float, the two of a pair are exchanged: cpu/words.h.
          const int64_t at =
              per == 2 ? (k / 2 * format.panel + lane) * 2 + k % 2 : (k ^ 1) * format.panel + lane;
          panel[at] = row[k];
        }
      }
    }
  });
  return packed;
}

// panel, values_per_word, keys, values (of a head and `capacity` slots, in words), bytes of the
// work space and of a task's scratch for `rows` rows.
std::vector<int64_t> decoder_sizes_cpu(const std::vector<Tensor>& weights,
                                       const std::vector<int64_t>& sizes, double eps, int64_t rows,
                                       int64_t capacity) {
  const Policy p = policy_of(weights, sizes, eps);
  const cpu::DecoderSizes s = p.sizes_of(rows, capacity);
  return {s.panel,  s.values_per_word,         s.keys,
          s.values, Workspace::bytes(p, rows), Workspace::task_bytes(p, rows)};
}

// --- Prefill -------------------------------------------------------------------------------------

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
    run_layers(p, w, count, team, [&](int64_t layer) {
      team.each(count, 2, [&](int64_t begin, int64_t end, char* scratch) {
        RLIR_CPU_KERNEL_AMX(decoder_append_rows)
        (m, layer, caches.prompts, sequence, in.positions + first, in.slots + first, w.qkv(), begin,
         end, w.raw(), scratch);
      });
      team.each(m.kv_heads * panels, m.kv_heads * panels,
                [&](int64_t begin, int64_t end, char* scratch) {
                  for (int64_t i = begin; i < end; ++i) {
                    const int64_t head = i / panels;
                    cpu::VideoAttention call =
                        raw_call(m, mask, w.raw(), 0, 1, count, head, reach.data());
                    call.keys = prompt_keys(m, caches.prompts, layer, sequence, head, seen);
                    call.out = out.get<char>() + head * group * m.head_dim * bytes;
                    call.out_stride = call.queries.stride;
                    RLIR_CPU_KERNEL_AMX(attend)(call, i % panels, scratch);
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

// --- A frame -------------------------------------------------------------------------------------

// A row of `rollouts`.
struct Rollout {
  int64_t prompt, sequence;  // of the caches
  int64_t context;           // slots of the prompt
  int64_t slot, position;    // where this frame's action block begins
  int64_t pending;           // the frame before's last token, not fed yet; -1: none
};
constexpr int64_t kRolloutNumbers = 6;

// A token that is fed, as in rlir/rollout/schedule.py.
struct Feed {
  int64_t step, slot, place, stands_in, predicts;
};
constexpr int64_t kFeedNumbers = 5;

struct Frame {
  const Policy& policy;
  DecoderCaches caches;
  AttentionMask mask;
  bool raster;
  int64_t slots;  // of an image
  const Rollout* rollouts;
  int64_t feeds;
  const Feed* feed;
  const int64_t *blocks, *stand_ins, *row_ids;  // [n][A], [n][rows], [n]
  const float* stem;                            // [n][S][D], or null
  int64_t* codes;                               // [n][S], drawn here
  float *logprob, *entropy;                     // [n][S]
  uint8_t* support;                             // [n][S][bytes], or null
  int64_t support_bytes, grid_rows;
  cpu::SampleTokens sampling;
};

// Most rows of a step of a rollout.
int64_t rows_a_step(const Frame& f) {
  int64_t most = f.policy.action() + 1, step = -1, rows = 0;
  for (int64_t i = 0; i < f.feeds; ++i) {
    rows = f.feed[i].step == step ? rows + 1 : 1;
    step = f.feed[i].step;
    most = std::max(most, rows);
  }
  return most;
}

// Rollouts first .. first + n - 1 of a frame, step by step.
class FrameChunk {
 public:
  FrameChunk(const Frame& f, int64_t first, int64_t n, bool parallel)
      : f_(f),
        p_(f.policy),
        first_(first),
        n_(n),
        w_(p_, n * rows_a_step(f)),
        team_(parallel, std::max(Workspace::task_bytes(p_, n * rows_a_step(f)),
                                 RLIR_CPU_KERNEL(sample_tokens_scratch)(p_.decoder.codes))) {
    int64_t most = n;
    for (int64_t i = 0, rows = 0, step = -1; i < f.feeds; ++i) {
      rows = f.feed[i].step == step ? rows + 1 : 1;
      step = f.feed[i].step;
      most = std::max(most, rows * n);
    }
    logits_.emplace(most * p_.decoder.codes * 4);
  }

  // Returns a rollout without a distribution, or -1.
  int64_t run() {
    for (int64_t i = 0; i < n_; ++i) begin_frame(f_.rollouts[first_ + i]);
    begin_step();
    for (int64_t i = 0; i < n_; ++i) {
      const int64_t r = first_ + i, a = p_.action();
      const Rollout& rollout = f_.rollouts[r];
      begin_member(r);
      if (rollout.pending >= 0) {
        row(r, rollout.slot - 1, rollout.position - 1, p_.block - 1, rollout.pending, -1);
      }
      for (int64_t j = 0; j < a; ++j) {
        row(r, rollout.slot + j, rollout.position + j, j, p_.decoder.codes + f_.blocks[r * a + j],
            j + 1 == a ? 0 : -1);
      }
    }
    int64_t bad = finish_step();
    for (int64_t begin = 0, end; begin < f_.feeds && bad < 0; begin = end) {
      for (end = begin; end < f_.feeds && f_.feed[end].step == f_.feed[begin].step;) ++end;
      begin_step();
      for (int64_t i = 0; i < n_; ++i) {
        const int64_t r = first_ + i, a = p_.action();
        const Rollout& rollout = f_.rollouts[r];
        begin_member(r);
        for (int64_t j = begin; j < end; ++j) {
          const Feed& feed = f_.feed[j];
          const int64_t token = feed.stands_in
                                    ? f_.stand_ins[r * f_.grid_rows + feed.place / columns()]
                                    : f_.codes[r * p_.image + feed.place];
          row(r, rollout.slot + a + feed.slot, rollout.position + a + feed.place, a + feed.place,
              token, feed.predicts);
        }
      }
      bad = finish_step();
    }
    return bad;
  }

 private:
  // A row whose hidden state predicts a place of a rollout's image.
  struct Draw {
    int64_t row, rollout, place;
  };

  int64_t columns() const { return p_.image / f_.grid_rows; }
  int64_t base(const Rollout& r) const { return r.context / cpu::kKeyBlock * cpu::kKeyBlock; }

  void begin_frame(const Rollout& r) {
    const int64_t capacity = f_.caches.own.capacity;
    if (r.pending < 0 && r.context % 2 == 1) {
      RLIR_CPU_KERNEL_AMX(decoder_place)
      (p_.decoder, f_.caches.prompts, r.prompt, r.context - 1, f_.caches.own, r.sequence,
       (r.context - 1 - base(r)) % capacity);
    }
    // A slot that is fed after one of its pair, or never, is read with it.
    const int64_t from = r.pending >= 0 ? r.slot - 1 : r.slot;
    RLIR_CPU_KERNEL_AMX(decoder_clear)
    (p_.decoder, f_.caches.own, r.sequence, (from - base(r)) % capacity,
     r.slot + p_.action() + f_.slots - from);
  }

  void begin_step() {
    step_.clear();
    draws_.clear();
  }

  void begin_member(int64_t r) {
    const Rollout& rollout = f_.rollouts[r];
    const int64_t start = base(rollout);
    step_.members.push_back({step_.count(), 0, rollout.prompt, rollout.sequence, start,
                             (rollout.context - start) / 2 * 2, nullptr, rollout.sequence});
  }

  void row(int64_t r, int64_t slot, int64_t position, int64_t embed, int64_t token,
           int64_t predicts) {
    const Rollout& rollout = f_.rollouts[r];
    const int64_t at = step_.count();
    const float* stem = predicts < 0 || f_.stem == nullptr
                            ? nullptr
                            : f_.stem + (r * p_.image + predicts) * p_.decoder.hidden;
    p_.embed(token, embed, stem, w_.x() + at * w_.sizes.x);
    Reach reach = reach_of(f_.mask, slot, INT64_MAX);
    if (f_.raster) reach.own = kNoOwn;  // all before it was fed before
    step_.rows.push_back(
        {position, rollout.sequence, (slot - base(rollout)) % f_.caches.own.capacity});
    step_.reach.push_back(reach);
    ++step_.members.back().count;
    if (predicts >= 0) draws_.push_back({at, r, predicts});
  }

  int64_t finish_step() {
    for (size_t i = 0; i < step_.members.size(); ++i) {
      cpu::DecoderMember& member = step_.members[i];
      member.reach = step_.reach.data() + member.first;
      if (i + 1 < step_.members.size()) member.next = step_.members[i + 1].sequence;
      GroupRun* run = step_.runs.empty() ? nullptr : &step_.runs.back();
      if (run != nullptr && run->prompt == member.prompt && run->tokens == member.count) {
        ++run->members;
      } else {
        step_.runs.push_back({member.prompt, member.base / cpu::kKeyBlock, static_cast<int64_t>(i),
                              1, member.count});
      }
    }
    run_step(p_, f_.caches, f_.mask, step_, w_, team_);
    return draws_.empty() ? -1 : draw();
  }

  int64_t draw() {
    const cpu::Decoder& m = p_.decoder;
    const int64_t count = static_cast<int64_t>(draws_.size());
    for (int64_t i = 0; i < count; ++i) {  // rows ascend: none is overwritten before it is read
      std::copy_n(w_.x() + draws_[i].row * w_.sizes.x, w_.sizes.x, w_.x() + i * w_.sizes.x);
    }
    RLIR_CPU_KERNEL_AMX(decoder_norm)(m, m.last, w_.x(), 0, count, w_.h());
    float* logits = logits_->get<float>();
    team_.each((m.codes + w_.sizes.panel - 1) / w_.sizes.panel, 4,
               [&](int64_t begin, int64_t end, char* scratch) {
                 RLIR_CPU_KERNEL_AMX(decoder_multiply)
                 (m, cpu::DecoderProduct::kHead, 0, w_.h(), count, begin, end, logits, scratch);
               });
    std::atomic<int64_t> bad{-1};
    team_.each(count, 2, [&](int64_t begin, int64_t end, char* scratch) {
      for (int64_t i = begin; i < end; ++i) {
        const Draw& d = draws_[i];
        const int64_t at = d.rollout * p_.image + d.place;
        cpu::SampleTokens sampling = f_.sampling;
        sampling.logits = logits + i * m.codes;
        sampling.row_ids = f_.row_ids + d.rollout;
        sampling.offset =
            static_cast<uint32_t>(f_.rollouts[d.rollout].position + p_.action() + d.place);
        sampling.token = f_.codes + at;
        sampling.logprob = f_.logprob + at;
        sampling.entropy = f_.entropy + at;
        if (f_.support != nullptr) sampling.support = f_.support + at * f_.support_bytes;
        if (RLIR_CPU_KERNEL(sample_tokens)(sampling, 0, 1, scratch) >= 0) bad = d.rollout;
      }
    });
    return bad;
  }

  const Frame& f_;
  const Policy& p_;
  int64_t first_, n_;
  Workspace w_;
  Team team_;
  std::optional<Scratch> logits_;
  StepRows step_;
  std::vector<Draw> draws_;
};

void check_rollouts(const Frame& f, int64_t n) {
  const Policy& p = f.policy;
  const int64_t span = p.action() + f.slots;
  for (int64_t i = 0; i < n; ++i) {
    const Rollout& r = f.rollouts[i];
    RLIR_CHECK(r.prompt >= 0 && r.prompt < f.caches.prompts.sequences && r.sequence >= 0 &&
                   r.sequence < f.caches.own.sequences && r.pending < p.decoder.codes,
               "decoder: rollout ", i, " must have caches and a code, got ", r.prompt, ", ",
               r.sequence, " and ", r.pending);
    RLIR_CHECK(r.context > 0 && r.context <= f.caches.prompts.capacity && r.slot >= r.context &&
                   r.position > 0 && r.position + p.block <= p.decoder.positions,
               "decoder: rollout ", i, " must go on after its prompt within the rotary table, got ",
               r.context, ", ", r.slot, " and ", r.position);
    const int64_t base = r.context / cpu::kKeyBlock * cpu::kKeyBlock;
    const Reach last = reach_of(f.mask, r.slot - 1, INT64_MAX);
    RLIR_CHECK(r.slot + span - std::max(base, last.low) <= f.caches.own.capacity,
               "decoder: a rollout's cache must hold what it sees, ",
               r.slot + span - std::max(base, last.low), " slots, got ", f.caches.own.capacity);
  }
}

void decoder_frame_cpu(const std::vector<Tensor>& weights, const std::vector<int64_t>& sizes,
                       double eps, const Tensor& prompt_k, const Tensor& prompt_v,
                       const Tensor& tail_k, const Tensor& tail_v, const Tensor& k, const Tensor& v,
                       const Tensor& rollouts, const Tensor& feeds, int64_t grid_rows,
                       int64_t image_slots, std::vector<int64_t> mask_numbers, const Tensor& blocks,
                       const Tensor& stand_ins, const std::optional<Tensor>& stem,
                       const Tensor& row_ids, const Tensor& codes, const Tensor& logprob,
                       const Tensor& entropy, const std::optional<Tensor>& support, int64_t seed,
                       double temperature, std::optional<int64_t> top_k,
                       std::optional<double> top_p, std::optional<double> min_p, bool parallel) {
  const Policy p = policy_of(weights, sizes, eps);
  const int64_t n = rollouts.dim() == 2 ? rollouts.size(0) : 0, s = p.image, a = p.action();
  RLIR_CHECK(temperature >= 0 && std::isfinite(static_cast<float>(temperature)),
             "decoder: temperature must be finite and >= 0, got ", temperature);
  if (n == 0) return;
  Frame f{.policy = p,
          .caches = {rows_of(p, prompt_k, prompt_v), cache_of("the tails", p, tail_k, tail_v),
                     cache_of("the rollouts' cache", p, k, v)},
          .mask = attention_mask("decoder", "diagonal", mask_numbers),
          .raster = false,
          .slots = image_slots,
          .rollouts =
              reinterpret_cast<const Rollout*>(integers("rollouts", rollouts, n * kRolloutNumbers)),
          .feeds = feeds.numel() / kFeedNumbers,
          .feed = nullptr,
          .blocks = integers("blocks", blocks, n * a),
          .stand_ins = integers("stand-ins", stand_ins, n * grid_rows),
          .row_ids = integers("row_ids", row_ids, n),
          .stem = stem.has_value() ? floats("stem", *stem, n * s * p.decoder.hidden) : nullptr,
          .codes = nullptr,
          .logprob = nullptr,
          .entropy = nullptr,
          .support = nullptr,
          .support_bytes = (p.decoder.codes + 7) / 8,
          .grid_rows = grid_rows,
          .sampling = {}};
  f.feed = reinterpret_cast<const Feed*>(integers("feeds", feeds, f.feeds * kFeedNumbers));
  RLIR_CHECK(grid_rows > 0 && s % grid_rows == 0 && f.mask.image == image_slots,
             "decoder: the schedule must be of this grid, got ", grid_rows, " rows and ",
             image_slots, " slots");
  f.raster = f.mask.ahead == f.mask.columns;
  for (int64_t i = 0; i < f.feeds; ++i) {
    const Feed& feed = f.feed[i];
    RLIR_CHECK(feed.slot >= 0 && feed.slot < image_slots && feed.place >= 0 && feed.place < s &&
                   feed.predicts < s,
               "decoder: feed ", i, " must be within the image, got slot ", feed.slot);
  }
  integers("codes", codes, n * s);
  floats("logprob", logprob, n * s);
  floats("entropy", entropy, n * s);
  f.codes = codes.mutable_data_ptr<int64_t>();
  f.logprob = logprob.mutable_data_ptr<float>();
  f.entropy = entropy.mutable_data_ptr<float>();
  if (support.has_value()) {
    RLIR_CHECK(support->is_cpu() && support->is_contiguous() &&
                   support->scalar_type() == ScalarType::Byte &&
                   support->numel() == n * s * f.support_bytes,
               "decoder: support must be uint8 [n, S, ceil(codes / 8)], got ", support->numel());
    f.support = support->mutable_data_ptr<uint8_t>();
  }
  check_below("blocks", f.blocks, n * a, p.vocabulary - p.decoder.codes);
  check_below("stand-ins", f.stand_ins, n * grid_rows, p.decoder.codes);
  check_rollouts(f, n);
  cpu::SampleTokens& sampling = f.sampling;
  sampling.dtype = Dtype::kFloat32;
  sampling.row_stride = sampling.tokens = sampling.high = p.decoder.codes;
  sampling.token_stride = sampling.row_id_stride = 1;
  sampling.temperature = temperature > 0 ? static_cast<float>(temperature) : 1.0f;
  sampling.greedy = temperature == 0;
  sampling.top_k = top_k.value_or(0);
  sampling.top_p = top_p.value_or(1.0);
  sampling.min_p = min_p.value_or(0.0);
  sampling.key = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};

  std::atomic<int64_t> bad{n};
  const auto chunk = [&](int64_t first, int64_t count, bool on_all_threads) {
    const int64_t row = FrameChunk(f, first, count, on_all_threads).run();
    for (int64_t now = bad; row >= 0 && row < now && !bad.compare_exchange_weak(now, row);) {
    }
  };
  if (parallel) {
    chunk(0, n, true);
  } else {
    torch::stable::parallel_for(0, (n + kUnit - 1) / kUnit, 1, [&](int64_t begin, int64_t end) {
      const int64_t last = std::min(end * kUnit, n);
      for (int64_t first = begin * kUnit; first < last; first += kChunk) {
        chunk(first, std::min(kChunk, last - first), false);
      }
    });
  }
  RLIR_CHECK(bad == n, "rollout: logits must be finite, got otherwise in rollout ", bad.load());
}

void huge_pages_cpu(const Tensor& x) { use_huge_pages(x); }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(rlir, m) {
  m.def("_decoder_pack(Tensor weight, bool bfloat16) -> Tensor");
  m.def("_decoder_pack_int8(Tensor values) -> Tensor");
  m.def("_huge_pages(Tensor(a!) x) -> ()");
  m.def(
      "_decoder_sizes(Tensor[] weights, int[] sizes, float eps, int rows, int capacity) -> int[]");
  m.def(
      "_decoder_prefill(Tensor[] weights, int[] sizes, float eps, Tensor ids, Tensor embeds, "
      "Tensor positions, Tensor slots, Tensor? added, str mask, int[] mask_numbers, int first, "
      "bool parallel, Tensor(a!) prompt_k, Tensor(b!) prompt_v, Tensor(c!) tail_k, "
      "Tensor(d!) tail_v) -> ()");
  m.def(
      "_decoder_frame(Tensor[] weights, int[] sizes, float eps, Tensor prompt_k, Tensor prompt_v, "
      "Tensor tail_k, Tensor tail_v, Tensor(a!) k, Tensor(b!) v, Tensor rollouts, Tensor feeds, "
      "int grid_rows, int image_slots, int[] mask_numbers, Tensor blocks, Tensor stand_ins, "
      "Tensor? stem, Tensor row_ids, Tensor(c!) codes, Tensor(d!) logprob, Tensor(e!) entropy, "
      "Tensor(f!)? support, int seed, float temperature, int? top_k, float? top_p, float? min_p, "
      "bool parallel) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(rlir, CPU, m) {
  m.impl("_decoder_pack", TORCH_BOX(&decoder_pack_cpu));
  m.impl("_decoder_pack_int8", TORCH_BOX(&decoder_pack_int8_cpu));
  m.impl("_huge_pages", TORCH_BOX(&huge_pages_cpu));
  m.impl("_decoder_sizes", TORCH_BOX(&decoder_sizes_cpu));
  m.impl("_decoder_prefill", TORCH_BOX(&decoder_prefill_cpu));
  m.impl("_decoder_frame", TORCH_BOX(&decoder_frame_cpu));
}

}  // namespace rlir
