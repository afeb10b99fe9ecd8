// rlir::selected_logprob_backward: CPU dispatch of the gradients.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "ops/selected_logprob.h"

namespace rlir {
namespace {

// What both layouts of a chunk's dz may take together, unless one block is more.
constexpr int64_t kChunkBytes = int64_t{1} << 24;

const float* gradient(const char* name, const std::optional<Tensor>& grad, const Tensor& hidden,
                      int64_t* stride) {
  check_head_gradient(name, grad, hidden);
  if (!grad) return nullptr;
  *stride = grad->stride(0);
  return grad->const_data_ptr<float>();
}

// The phases of the backward pass over one chunk of the vocabulary.
void run_chunk(cpu::HeadGradient& g, const cpu::HeadSizes& sizes) {
  const cpu::Head& head = g.head;
  const int64_t panels = sizes.padded / sizes.panel_rows;
  const auto tiles = RLIR_CPU_KERNEL_AMX(gradient_logits);
  for_tiles(head.rows, sizes.panel_rows, g.block_begin, g.block_end,
            [&](int64_t p0, int64_t p1, int64_t b0, int64_t b1) {
              const Scratch scratch(sizes.scratch);
              tiles(g, p0, p1, b0, b1, scratch.get());
            });
  if (g.grad_hidden != nullptr) {
    const auto transpose = RLIR_CPU_KERNEL_AMX(gradient_weight_t);
    torch::stable::parallel_for(0, head.depth, 128,
                                [&](int64_t begin, int64_t end) { transpose(g, begin, end); });
    // Many rows: a thread keeps its panels. Few: threads share h as well.
    const int64_t steps = (head.depth + cpu::kHeadStep - 1) / cpu::kHeadStep;
    const int64_t parts =
        panels >= 8 * static_cast<int64_t>(torch::stable::get_num_threads()) ? 1 : steps;
    const auto product = RLIR_CPU_KERNEL_AMX(gradient_hidden);
    torch::stable::parallel_for(0, panels * parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t panel = i / parts, part = i % parts;
        const int64_t h = steps * part / parts * cpu::kHeadStep;
        const int64_t h_end = steps * (part + 1) / parts * cpu::kHeadStep;
        product(g, panel, panel + 1, h, std::min(h_end, head.depth), nullptr);
      }
    });
    g.first = false;
  }
  if (g.grad_weight != nullptr) {
    const auto product = RLIR_CPU_KERNEL_AMX(gradient_weight);
    const int64_t blocks = g.block_end - g.block_begin;
    torch::stable::parallel_for(
        0, sizes.weight_panels * blocks, 1, [&](int64_t begin, int64_t end) {
          const Scratch scratch(sizes.scratch);
          for (int64_t i = begin; i < end; ++i) {
            const int64_t panel = i / blocks, block = g.block_begin + i % blocks;
            product(g, panel, panel + 1, block, block + 1, scratch.get());
          }
        });
  }
  if (g.grad_bias != nullptr) {
    const int64_t start = g.block_begin * cpu::kHeadBlock;
    const int64_t end = std::min(head.high, g.block_end * cpu::kHeadBlock) - start;
    RLIR_CPU_KERNEL_AMX(gradient_bias)(g, std::max<int64_t>(0, head.low - start), end);
  }
}

std::tuple<Tensor, Tensor, Tensor> selected_logprob_backward_cpu(
    const std::optional<Tensor>& grad_logprob, const std::optional<Tensor>& grad_entropy,
    const Tensor& hidden, const Tensor& weight, const Tensor& targets,
    const std::optional<Tensor>& bias, const std::optional<Tensor>& support, const Tensor& entropy,
    const Tensor& stats, double temperature, int64_t low, std::optional<int64_t> high,
    bool need_hidden, bool need_weight, bool need_bias) {
  HeadInputs in = head_inputs("selected_logprob", hidden, weight, bias, temperature, low, high);
  add_targets(in, targets, hidden);
  add_support(in, support, hidden);
  cpu::Head& head = in.head;
  const int64_t n = head.rows, h = head.depth, v = head.tokens;
  check_head_saved(stats, entropy, grad_entropy.has_value(), hidden);
  const auto part = [&](bool needed, const Tensor& like, std::initializer_list<int64_t> sizes,
                        bool whole, ScalarType dtype) {
    if (!needed) return torch::stable::new_empty(like, {0}, dtype);
    return whole ? torch::stable::new_empty(like, sizes, dtype)
                 : torch::stable::new_zeros(like, sizes, dtype);
  };
  const bool whole = head.low == 0 && head.high == v && n > 0;
  Tensor grad_hidden = part(need_hidden, hidden, {n, h}, true, hidden.scalar_type());
  Tensor grad_weight = part(need_weight, weight, {v, h}, whole, weight.scalar_type());
  Tensor grad_bias = part(need_bias, hidden, {v}, whole, ScalarType::Float);
  if (n == 0) return {grad_hidden, grad_weight, grad_bias};

  cpu::HeadGradient g{};
  g.grad_logprob = gradient("grad_logprob", grad_logprob, hidden, &g.grad_logprob_stride);
  g.grad_entropy = gradient("grad_entropy", grad_entropy, hidden, &g.grad_entropy_stride);
  g.grad_hidden = need_hidden ? grad_hidden.mutable_data_ptr() : nullptr;
  g.grad_weight = need_weight ? grad_weight.mutable_data_ptr() : nullptr;
  g.grad_bias = need_bias ? grad_bias.mutable_data_ptr<float>() : nullptr;
  head.stats = const_cast<float*>(stats.const_data_ptr<float>());
  head.entropy = grad_entropy ? const_cast<float*>(entropy.const_data_ptr<float>()) : nullptr;

  const cpu::HeadSizes sizes = RLIR_CPU_KERNEL_AMX(head_sizes)(head);
  const int64_t panels = sizes.padded / sizes.panel_rows;
  const int64_t per_block = sizes.chunk_panels + sizes.chunk_rows;
  const int64_t chunk = std::clamp<int64_t>(kChunkBytes / per_block, 1, 8);
  const int64_t groups = (n + cpu::kHeadGroup - 1) / cpu::kHeadGroup;
  const Scratch packed(sizes.panels);
  const Scratch chunk_panels(chunk * sizes.chunk_panels), chunk_rows(chunk * sizes.chunk_rows);
  const Scratch chunk_weight(need_hidden ? chunk * sizes.chunk_weight : 0);
  const Scratch grad_panels(need_hidden ? sizes.grad_panels : 0);
  const Scratch hidden_lanes(need_weight ? sizes.hidden_lanes : 0);
  const Scratch bias_sums(need_bias ? groups * chunk * cpu::kHeadBlock * 16 * 4 : 0);
  head.panels = packed.get();
  g.head = head;
  g.first = true;
  g.chunk_panels = chunk_panels.get();
  g.chunk_rows = chunk_rows.get();
  g.chunk_weight = chunk_weight.get();
  g.hidden_lanes = hidden_lanes.get();
  g.grad_panels = grad_panels.get<float>();
  g.bias_sums = need_bias ? bias_sums.get<float>() : nullptr;

  const auto pack = RLIR_CPU_KERNEL_AMX(head_pack);
  torch::stable::parallel_for(0, panels, 4,
                              [&](int64_t begin, int64_t end) { pack(g.head, begin, end); });
  if (need_weight) {
    const auto lanes = RLIR_CPU_KERNEL_AMX(gradient_lanes);
    torch::stable::parallel_for(0, sizes.weight_panels, 1,
                                [&](int64_t begin, int64_t end) { lanes(g, begin, end); });
  }
  for (int64_t block = in.first_block(); block < in.last_block(); block += chunk) {
    g.block_begin = block;
    g.block_end = std::min(block + chunk, in.last_block());
    run_chunk(g, sizes);
  }
  if (need_hidden) {
    const auto rows = RLIR_CPU_KERNEL_AMX(gradient_rows);
    torch::stable::parallel_for(0, panels, 4,
                                [&](int64_t begin, int64_t end) { rows(g, begin, end); });
  }
  return {grad_hidden, grad_weight, grad_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(rlir, m) {
  m.def(kSelectedLogprobBackwardSchema, {at::Tag::pt2_compliant_tag});
}

STABLE_TORCH_LIBRARY_IMPL(rlir, CPU, m) {
  m.impl("selected_logprob_backward", TORCH_BOX(&selected_logprob_backward_cpu));
}

}  // namespace rlir
