// rlir::_decoder_stem: the stem of all rollouts of a frame; rlir::_stem_saved: the same and what
// its gradients need (rlir/models/stem.py). Formula: cpu/stem.h.
#include "cpu/stem.h"

#include <torch/csrc/stable/library.h>

#include <vector>

#include "core/scratch.h"
#include "ops/decoder.h"

namespace rlir {
namespace {

// Weights in the order of cpu/stem.h; sizes: rows, columns, embedding, channels, blocks, hidden,
// input_width, block_width, codes, vocabulary of actions, bfloat16.
void run(const std::vector<Tensor>& w, const std::vector<int64_t>& n, const Tensor& previous,
         const Tensor& blocks, const Tensor& out, const Tensor* saved) {
  RLIR_CHECK(w.size() == 8 && n.size() == 11,
             "decoder: a stem must have 8 weights and 11 sizes, "
             "got ",
             w.size(), " and ", n.size());
  for (int i = 0; i < 10; ++i) {
    RLIR_CHECK(n[i] >= (i == 4 ? 0 : 1) && n[i] < int64_t{1} << 31,
               "decoder: sizes of a stem must be positive, got ", n[i]);
  }
  RLIR_CHECK(previous.dim() == 2 && blocks.dim() == 2,
             "decoder: previous codes and blocks must have 2 dimensions, got ", previous.dim(),
             " and ", blocks.dim());
  const int64_t b = previous.size(0), count = n[0] * n[1];
  cpu::Stem m{};
  m.rows = n[0];
  m.columns = n[1];
  m.embedding = n[2];
  m.channels = n[3];
  m.blocks = n[4];
  m.hidden = n[5];
  m.input_width = n[6];
  m.block_width = n[7];
  m.bfloat16 = n[10] != 0;
  m.action = blocks.size(1);
  const PackedFormat packed(m.bfloat16);
  const int64_t channels = round_up(m.channels, 16), embedding = round_up(m.embedding, 16);
  m.codes = floats("codes of the stem", w[0], n[8] * embedding);
  m.film = floats("film", w[1], n[9] * (m.blocks + 1) * 2 * channels);
  m.input = packed("input", w[2], 3, m.channels, m.input_width * embedding);
  m.input_bias = floats("input bias", w[3], channels);
  m.block = packed("blocks", w[4], 3 * m.blocks, m.channels, m.block_width * channels);
  m.block_bias = floats("block bias", w[5], m.blocks * channels);
  m.output = packed("output", w[6], 1, m.hidden, channels);
  m.output_bias = floats("output bias", w[7], round_up(m.hidden, 16));
  const int64_t* codes = integers("previous codes", previous, b * count);
  const int64_t* tokens = integers("blocks", blocks, b * m.action);
  check_below("previous codes", codes, b * count, n[8]);
  check_below("blocks", tokens, b * m.action, n[9]);
  floats("stem", out, b * count * m.hidden);
  float* to = out.mutable_data_ptr<float>();
  const int64_t kept = (m.blocks + 1) * 2 * count * channels;
  if (saved != nullptr) floats("saved", *saved, b * kept);
  float* keep = saved == nullptr ? nullptr : saved->mutable_data_ptr<float>();
  const auto rollout = RLIR_CPU_KERNEL_BF16(stem_rollout);
  const int64_t bytes = RLIR_CPU_KERNEL_BF16(stem_scratch)(m);
  torch::stable::parallel_for(0, b, 1, [&](int64_t begin, int64_t end) {
    const Scratch scratch(bytes);
    for (int64_t i = begin; i < end; ++i) {
      rollout(m, codes + i * count, tokens + i * m.action, to + i * count * m.hidden,
              keep == nullptr ? nullptr : keep + i * kept, scratch.get());
    }
  });
}

void decoder_stem_cpu(const std::vector<Tensor>& w, const std::vector<int64_t>& n,
                      const Tensor& previous, const Tensor& blocks, const Tensor& out) {
  run(w, n, previous, blocks, out, nullptr);
}

void stem_saved_cpu(const std::vector<Tensor>& w, const std::vector<int64_t>& n,
                    const Tensor& previous, const Tensor& blocks, const Tensor& out,
                    const Tensor& saved) {
  run(w, n, previous, blocks, out, &saved);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(rlir, m) {
  m.def(
      "_decoder_stem(Tensor[] weights, int[] sizes, Tensor previous, Tensor blocks, "
      "Tensor(a!) out) -> ()");
  m.def(
      "_stem_saved(Tensor[] weights, int[] sizes, Tensor previous, Tensor blocks, Tensor(a!) out, "
      "Tensor(b!) saved) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(rlir, CPU, m) {
  m.impl("_decoder_stem", TORCH_BOX(&decoder_stem_cpu));
  m.impl("_stem_saved", TORCH_BOX(&stem_saved_cpu));
}

}  // namespace rlir
