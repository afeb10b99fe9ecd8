// rlir::_decoder_pack, _decoder_prefill and _decoder_frame: what rlir/rollout/engine.py is made of.
// Formulas and layouts: cpu/decoder.h. Stream and slots: rlir/models/world_model.py.
#include "ops/decoder.h"

#include <torch/csrc/stable/library.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <atomic>
#include <cmath>
#include <vector>

#include "core/scratch.h"
#include "cpu/sample_tokens.h"

namespace rlir {
namespace {

constexpr int64_t kUnit = 8;    // rows that no two threads share: a tile of every build
constexpr int64_t kChunk = 16;  // rows that go through the layers together

// A Decoder and the embeddings in front of it.
struct Policy {
  cpu::Decoder decoder{};
  const float *tokens = nullptr, *slots = nullptr;  // [vocabulary][stride], [block][stride]
  int64_t vocabulary = 0, block = 0, image = 0;     // image: visual tokens a frame
  int64_t stride = 0;

  int64_t action() const { return block - image; }
  cpu::DecoderSizes sizes(int64_t rows, int64_t capacity, int64_t seen) const {
    return RLIR_CPU_KERNEL_BF16(decoder_sizes)(decoder, rows, capacity, seen);
  }
};

// Weights in the order of engine.py; sizes: hidden, layers, heads, kv_heads, mlp, codes,
// vocabulary, image, block, positions, bfloat16.
Policy policy_of(const std::vector<Tensor>& w, const std::vector<int64_t>& n, double eps) {
  RLIR_CHECK(w.size() == 10 && n.size() == 11,
             "decoder: there must be 10 weights and 11 sizes, got ", w.size(), " and ", n.size());
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
  RLIR_CHECK(m.hidden % m.heads == 0 && m.head_dim % 2 == 0 && m.heads % m.kv_heads == 0,
             "decoder: hidden / heads must be even and heads % kv_heads 0, got ", m.hidden, ", ",
             m.heads, " and ", m.kv_heads);
  RLIR_CHECK(p.image < p.block && p.vocabulary >= m.codes,
             "decoder: a block must hold an action and an image, got ", p.block, " and ", p.image);
  p.stride = round_up(m.hidden, 16);
  p.tokens = floats("token embeddings", w[0], p.vocabulary * p.stride);
  p.slots = floats("slot embeddings", w[1], p.block * p.stride);
  m.norms = floats("norms", w[2], m.layers * 2 * p.stride);
  m.last = floats("the last norm", w[3], p.stride);
  m.rotary = floats("the rotary table", w[4], 2 * m.positions * m.head_dim);
  const PackedFormat packed(m.bfloat16);
  m.qkv = packed("qkv", w[5], m.layers, (m.heads + 2 * m.kv_heads) * m.head_dim, m.hidden);
  m.out = packed("o", w[6], m.layers, m.hidden, m.hidden);
  m.gate_up = packed("gate and up", w[7], m.layers * 2, m.mlp, m.hidden);
  m.down = packed("down", w[8], m.layers, m.hidden, m.mlp);
  m.head = packed("head", w[9], 1, m.codes, m.hidden);
  return p;
}

// k and v of `capacity` positions, of one shape for all builds of a format.
cpu::DecoderCache cache_of(const char* name, const Policy& p, const Tensor& k, const Tensor& v,
                           int64_t sequences, int64_t capacity) {
  const cpu::DecoderSizes sizes = p.sizes(1, capacity, 1);
  const int64_t heads = p.decoder.layers * sequences * p.decoder.kv_heads;
  const ScalarType dtype = sizes.values_per_word == 2 ? ScalarType::Int : ScalarType::Float;
  for (const Tensor* x : {&k, &v}) {
    RLIR_CHECK(x->is_cpu() && x->is_contiguous() && x->scalar_type() == dtype &&
                   x->numel() == heads * (x == &k ? sizes.keys : sizes.values),
               "decoder: ", name, " must be a cache of ", sequences, " sequences of ", capacity,
               " positions, got ", x->numel(), " words");
  }
  return {k.mutable_data_ptr(), v.mutable_data_ptr(), sequences, capacity};
}

// A step reads all of a cache, a few lines a page: with pages of 4 KiB it would mostly wait for
// their addresses. Advice before the first touch; where the system has none, nothing happens.
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
  const int64_t size = bfloat16 ? 2 : 4;
  const auto pack = RLIR_CPU_KERNEL_BF16(decoder_pack);
  for (int64_t i = 0; i < n; ++i) {
    const Matrix one{
        static_cast<const char*>(weight.const_data_ptr()) + i * weight.stride(0) * size,
        bfloat16 ? Dtype::kBFloat16 : Dtype::kFloat32, weight.stride(1), weight.stride(2)};
    pack(one, outputs, depth, bfloat16,
         static_cast<char*>(packed.mutable_data_ptr()) + i * panels * words * format.panel * 4);
  }
  return packed;
}

void embed(const Policy& p, int64_t token, int64_t slot, const float* stem, float* x) {
  const float *t = p.tokens + token * p.stride, *s = p.slots + slot * p.stride;
  for (int64_t i = 0; i < p.stride; ++i) x[i] = t[i] + s[i];
  if (stem == nullptr) return;
  for (int64_t i = 0; i < p.decoder.hidden; ++i) x[i] += stem[i];
}

void decoder_prefill_cpu(const std::vector<Tensor>& weights, const std::vector<int64_t>& sizes,
                         double eps, const Tensor& prompts, const Tensor& k, const Tensor& v) {
  const Policy p = policy_of(weights, sizes, eps);
  const int64_t n = prompts.size(0), s = p.image;
  const int64_t* ids = integers("prompts", prompts, n * s);
  check_below("codes", ids, n * s, p.decoder.codes);
  RLIR_CHECK(s <= p.decoder.positions, "decoder: a prompt must fit the rotary table, got ", s);
  const cpu::DecoderCache cache = cache_of("the prompts' cache", p, k, v, n, s);
  const cpu::DecoderCache none{nullptr, nullptr, 0, 0};
  const cpu::DecoderSizes space = p.sizes(s, 1, s + 16);
  const auto layers = RLIR_CPU_KERNEL_BF16(decoder_layers);
  torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
    const Scratch x(s * p.stride * 4), scratch(space.scratch * 4);
    std::vector<cpu::DecoderRow> rows(s);
    for (int64_t prompt = begin; prompt < end; ++prompt) {
      for (int64_t t = 0; t < s; ++t) {
        embed(p, ids[prompt * s + t], p.action() + t, nullptr, x.get<float>() + t * p.stride);
        rows[t] = {t, 0, 0, prompt, t + 1};
      }
      layers(p.decoder, none, cache, rows.data(), s, x.get<float>(), scratch.get());
    }
  });
}

struct Frame {
  const Policy& policy;
  cpu::DecoderCache shared, own;
  int64_t group_size, length, frame, actions;
  int64_t* codes;            // [B][length][S]
  const int64_t* blocks;     // [B][A]
  const float* stem;         // [B][S][D]
  float *logprob, *entropy;  // [B][length - 1][S]
  cpu::SampleTokens sampling;
};

// Rows first .. first + n - 1 of a frame, token by token. Returns a row without a distribution, or
// -1.
int64_t frame_chunk(const Frame& f, int64_t first, int64_t n) {
  const Policy& p = f.policy;
  const int64_t s = p.image, a = p.action(), codes = p.decoder.codes;
  const int64_t start = s + (f.frame - 1) * p.block;  // position of the action block
  const int64_t seen = start + p.block + 32;
  const Scratch x_space(n * p.stride * 4), logits_space(n * codes * 4);
  const Scratch scratch(p.sizes(n, 1, seen).scratch * 4);
  const Scratch sampling_scratch(RLIR_CPU_KERNEL(sample_tokens_scratch)(codes));
  // An odd last position of the prompt is each rollout's own (cpu/decoder.h).
  const int64_t shared = s / 2 * 2;
  for (int64_t i = 0; shared < s && f.frame == 1 && i < n; ++i) {
    RLIR_CPU_KERNEL_BF16(decoder_copy)
    (p.decoder, f.shared, (first + i) / f.group_size, shared, f.own, first + i, 0);
  }
  std::vector<int64_t> token(n);
  std::vector<float> logprob(n), entropy(n);
  std::vector<cpu::DecoderRow> rows(n);
  float* x = x_space.get<float>();
  cpu::SampleTokens sampling = f.sampling;
  sampling.logits = logits_space.get();
  sampling.row_ids += first;
  sampling.token = token.data();
  sampling.logprob = logprob.data();
  sampling.entropy = entropy.data();
  // The last token of the frame before is in no cache yet: it goes first.
  for (int64_t j = f.frame > 1 ? -1 : 0; j < a + s - 1; ++j) {
    const int64_t position = start + j, image = j - (a - 1);  // the code that this step draws
    for (int64_t i = 0; i < n; ++i) {
      const int64_t row = first + i;
      int64_t* drawn = f.codes + (row * f.length + f.frame) * s;
      const int64_t id = j < 0 ? drawn[-1] : j < a ? codes + f.blocks[row * a + j] : drawn[j - a];
      const float* stem = image < 0 ? nullptr : f.stem + (row * s + image) * p.decoder.hidden;
      embed(p, id, j < 0 ? p.block - 1 : j, stem, x + i * p.stride);
      rows[i] = {position, row / f.group_size, shared, row, position - shared + 1};
    }
    RLIR_CPU_KERNEL_BF16(decoder_layers)
    (p.decoder, f.shared, f.own, rows.data(), n, x, scratch.get());
    if (image < 0) continue;
    RLIR_CPU_KERNEL_BF16(decoder_logits)
    (p.decoder, x, n, logits_space.get<float>(), scratch.get());
    sampling.offset = static_cast<uint32_t>(position + 1);
    const int64_t bad = RLIR_CPU_KERNEL(sample_tokens)(sampling, 0, n, sampling_scratch.get());
    if (bad >= 0) return first + bad;
    for (int64_t i = 0; i < n; ++i) {
      const int64_t at = ((first + i) * (f.length - 1) + f.frame - 1) * s + image;
      f.codes[((first + i) * f.length + f.frame) * s + image] = token[i];
      f.logprob[at] = logprob[i];
      f.entropy[at] = entropy[i];
    }
  }
  return -1;
}

void decoder_frame_cpu(const std::vector<Tensor>& weights, const std::vector<int64_t>& sizes,
                       double eps, const Tensor& shared_k, const Tensor& shared_v, const Tensor& k,
                       const Tensor& v, const Tensor& codes, const Tensor& blocks,
                       const Tensor& stem, const Tensor& row_ids, const Tensor& logprob,
                       const Tensor& entropy, int64_t frame, int64_t seed, double temperature) {
  const Policy p = policy_of(weights, sizes, eps);
  const int64_t s = p.image, a = p.action();
  RLIR_CHECK(codes.dim() == 3 && codes.size(2) == s, "decoder: codes must be [B, L, ", s, "], got ",
             codes.dim(), " dimensions");
  const int64_t b = codes.size(0), length = codes.size(1),
                capacity = s % 2 + (length - 1) * p.block;
  RLIR_CHECK(frame > 0 && frame < length && s / 2 * 2 + capacity <= p.decoder.positions,
             "decoder: frame must be from 1 and below ", length, ", got ", frame);
  const int64_t prompts = shared_k.size(1);
  RLIR_CHECK(prompts > 0 && b % prompts == 0, "decoder: rollouts must be groups of prompts, got ",
             b, " and ", prompts);
  RLIR_CHECK(temperature >= 0 && std::isfinite(static_cast<float>(temperature)),
             "decoder: temperature must be finite and >= 0, got ", temperature);
  if (b == 0) return;
  integers("codes", codes, b * length * s);
  floats("logprob", logprob, b * (length - 1) * s);
  floats("entropy", entropy, b * (length - 1) * s);
  Frame f{.policy = p,
          .shared = cache_of("the prompts' cache", p, shared_k, shared_v, prompts, s),
          .own = cache_of("the cache", p, k, v, b, capacity),
          .group_size = b / prompts,
          .length = length,
          .frame = frame,
          .actions = a,
          .codes = codes.mutable_data_ptr<int64_t>(),
          .blocks = integers("blocks", blocks, b * a),
          .stem = floats("stem", stem, b * s * p.decoder.hidden),
          .logprob = logprob.mutable_data_ptr<float>(),
          .entropy = entropy.mutable_data_ptr<float>(),
          .sampling = {}};
  check_below("blocks", f.blocks, b * a, p.vocabulary - p.decoder.codes);
  for (int64_t row = 0; row < b; ++row) {
    check_below("codes", f.codes + (row * length + frame - 1) * s, s, p.decoder.codes);
  }
  cpu::SampleTokens& sampling = f.sampling;
  sampling.dtype = Dtype::kFloat32;
  sampling.row_stride = sampling.tokens = sampling.high = p.decoder.codes;
  sampling.token_stride = sampling.row_id_stride = 1;
  sampling.temperature = temperature > 0 ? static_cast<float>(temperature) : 1.0f;
  sampling.greedy = temperature == 0;
  sampling.top_p = 1.0;
  sampling.key = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
  sampling.row_ids = integers("row_ids", row_ids, b);

  if (frame == 1) {
    use_huge_pages(k);
    use_huge_pages(v);
  }
  std::atomic<int64_t> bad{b};
  torch::stable::parallel_for(0, (b + kUnit - 1) / kUnit, 1, [&](int64_t begin, int64_t end) {
    const int64_t last = std::min(end * kUnit, b);
    for (int64_t first = begin * kUnit; first < last; first += kChunk) {
      const int64_t row = frame_chunk(f, first, std::min(kChunk, last - first));
      for (int64_t now = bad; row >= 0 && row < now && !bad.compare_exchange_weak(now, row);) {
      }
    }
  });
  RLIR_CHECK(bad == b, "rollout: logits must be finite, got otherwise in rollout ", bad.load());
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(rlir, m) {
  m.def("_decoder_pack(Tensor weight, bool bfloat16) -> Tensor");
  m.def(
      "_decoder_prefill(Tensor[] weights, int[] sizes, float eps, Tensor prompts, Tensor(a!) k, "
      "Tensor(b!) v) -> ()");
  m.def(
      "_decoder_frame(Tensor[] weights, int[] sizes, float eps, Tensor shared_k, Tensor shared_v, "
      "Tensor(a!) k, Tensor(b!) v, Tensor(c!) codes, Tensor blocks, Tensor stem, Tensor row_ids, "
      "Tensor(d!) logprob, Tensor(e!) entropy, int frame, int seed, float temperature) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(rlir, CPU, m) {
  m.impl("_decoder_pack", TORCH_BOX(&decoder_pack_cpu));
  m.impl("_decoder_prefill", TORCH_BOX(&decoder_prefill_cpu));
  m.impl("_decoder_frame", TORCH_BOX(&decoder_frame_cpu));
}

}  // namespace rlir
