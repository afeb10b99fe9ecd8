// rlir::_decoder_*: what rlir/rollout/engine.py is made of; here policies, packing and sizes.
// Formulas and layouts: cpu/decoder.h. A prompt: decoder_prefill.cpp; a frame: decoder_frame.cpp.
#include <torch/csrc/stable/library.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "ops/decoder_step.h"

namespace rlir {

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

namespace {

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

void huge_pages_cpu(const Tensor& x) { use_huge_pages(x); }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(rlir, m) {
  m.def("_decoder_pack(Tensor weight, bool bfloat16) -> Tensor");
  m.def("_decoder_pack_int8(Tensor values) -> Tensor");
  m.def("_huge_pages(Tensor(a!) x) -> ()");
  m.def(
      "_decoder_sizes(Tensor[] weights, int[] sizes, float eps, int rows, int capacity) -> int[]");
}

STABLE_TORCH_LIBRARY_IMPL(rlir, CPU, m) {
  m.impl("_decoder_pack", TORCH_BOX(&decoder_pack_cpu));
  m.impl("_decoder_pack_int8", TORCH_BOX(&decoder_pack_int8_cpu));
  m.impl("_huge_pages", TORCH_BOX(&huge_pages_cpu));
  m.impl("_decoder_sizes", TORCH_BOX(&decoder_sizes_cpu));
}

}  // namespace rlir
