// rlir::selected_logprob, rlir::head_logits and rlir::selected_support: CPU dispatch. Formulas and
// tiles: cpu/selected_logprob.h.
#include "ops/selected_logprob.h"

#include <torch/csrc/stable/library.h>

#include <cmath>
#include <tuple>

namespace rlir {
namespace {

float float_at(const Tensor& x, int64_t i) {
  if (x.scalar_type() == ScalarType::Float) return x.const_data_ptr<float>()[i];
  return static_cast<float>(load(static_cast<const BFloat16*>(x.const_data_ptr()) + i));
}

// What head_blocks and its like run on: hidden in panels.
Scratch packed(HeadInputs& in, const cpu::HeadSizes& sizes) {
  Scratch panels(sizes.panels);
  in.head.panels = panels.get();
  const auto pack = RLIR_CPU_KERNEL_AMX(head_pack);
  torch::stable::parallel_for(0, sizes.padded / sizes.panel_rows, 4,
                              [&](int64_t begin, int64_t end) { pack(in.head, begin, end); });
  return panels;
}

std::tuple<Tensor, Tensor, Tensor> selected_logprob_cpu(
    const Tensor& hidden, const Tensor& weight, const Tensor& targets,
    const std::optional<Tensor>& bias, const std::optional<Tensor>& support, double temperature,
    int64_t low, std::optional<int64_t> high, bool compute_entropy) {
  HeadInputs in = head_inputs("selected_logprob", hidden, weight, bias, temperature, low, high);
  add_targets(in, targets, hidden);
  add_support(in, support, hidden);
  cpu::Head& head = in.head;
  head.with_entropy = compute_entropy;
  const int64_t n = head.rows;
  Tensor logprob = torch::stable::new_empty(hidden, {n}, ScalarType::Float);
  Tensor entropy = torch::stable::new_empty(hidden, {compute_entropy ? n : 0}, ScalarType::Float);
  Tensor stats = torch::stable::new_empty(hidden, {3, n}, ScalarType::Float);
  if (n == 0) return {logprob, entropy, stats};
  head.logprob = logprob.mutable_data_ptr<float>();
  head.entropy = compute_entropy ? entropy.mutable_data_ptr<float>() : nullptr;
  head.stats = stats.mutable_data_ptr<float>();

  const cpu::HeadSizes sizes = RLIR_CPU_KERNEL_AMX(head_sizes)(head);
  const Scratch panels = packed(in, sizes);
  const int64_t blocks = in.last_block() - in.first_block();
  const Scratch sums(3 * blocks * sizes.padded * 4), target_z(sizes.padded * 4);
  head.block_max = sums.get<float>();
  head.block_sum = head.block_max + blocks * sizes.padded;
  head.block_dot = head.block_sum + blocks * sizes.padded;
  head.target_z = target_z.get<float>();
  const auto tiles = RLIR_CPU_KERNEL_AMX(head_blocks);
  for_tiles(n, sizes.panel_rows, in.first_block(), in.last_block(),
            [&](int64_t p0, int64_t p1, int64_t b0, int64_t b1) {
              const Scratch scratch(sizes.scratch);
              tiles(head, p0, p1, b0, b1, scratch.get());
            });
  const auto rows = RLIR_CPU_KERNEL_AMX(head_rows);
  torch::stable::parallel_for(0, sizes.padded / sizes.panel_rows, 8,
                              [&](int64_t begin, int64_t end) { rows(head, begin, end); });
  return {logprob, entropy, stats};
}

Tensor head_logits_cpu(const Tensor& hidden, const Tensor& weight,
                       const std::optional<Tensor>& bias) {
  HeadInputs in = head_inputs("head_logits", hidden, weight, bias, 1.0, 0, std::nullopt);
  const int64_t n = in.head.rows;
  Tensor logits = torch::stable::new_empty(hidden, {n, in.head.tokens}, ScalarType::Float);
  if (n == 0) return logits;
  const cpu::HeadSizes sizes = RLIR_CPU_KERNEL_AMX(head_sizes)(in.head);
  const Scratch panels = packed(in, sizes);
  const auto tiles = RLIR_CPU_KERNEL_AMX(head_logits);
  float* out = logits.mutable_data_ptr<float>();
  for_tiles(n, sizes.panel_rows, in.first_block(), in.last_block(),
            [&](int64_t p0, int64_t p1, int64_t b0, int64_t b1) {
              const Scratch scratch(sizes.scratch);
              tiles(in.head, out, p0, p1, b0, b1, scratch.get());
            });
  return logits;
}

Tensor selected_support_cpu(const Tensor& hidden, const Tensor& weight,
                            const std::optional<Tensor>& bias, double temperature,
                            std::optional<int64_t> top_k, std::optional<double> top_p, int64_t low,
                            std::optional<int64_t> high) {
  HeadInputs in = head_inputs("selected_logprob", hidden, weight, bias, temperature, low, high);
  check_truncation(top_k, top_p, in.head.tokens);
  const int64_t n = in.head.rows, bytes = (in.head.tokens + 7) / 8;
  Tensor mask = torch::stable::new_empty(hidden, {n, bytes}, ScalarType::Byte);
  if (n == 0) return mask;
  const cpu::HeadSizes sizes = RLIR_CPU_KERNEL_AMX(head_sizes)(in.head);
  const Scratch panels = packed(in, sizes);
  const auto kernel = RLIR_CPU_KERNEL_AMX(head_support);
  uint8_t* out = mask.mutable_data_ptr<uint8_t>();
  torch::stable::parallel_for(0, sizes.padded / sizes.panel_rows, 1,
                              [&](int64_t begin, int64_t end) {
                                const Scratch scratch(sizes.scratch), rows(sizes.row_logits);
                                kernel(in.head, top_k.value_or(0), top_p.value_or(1.0), out, bytes,
                                       begin, end, scratch.get(), rows.get());
                              });
  return mask;
}

}  // namespace

HeadInputs head_inputs(const char* op, const Tensor& hidden, const Tensor& weight,
                       const std::optional<Tensor>& bias, double temperature, int64_t low,
                       std::optional<int64_t> high) {
  const HeadShape shape = head_shape(op, hidden, weight, bias, temperature, low, high);
  HeadInputs in;
  cpu::Head& head = in.head;
  head.hidden = head_matrix(op, "hidden", hidden, hidden);
  head.weight = head_matrix(op, "weight", weight, hidden);
  head.rows = shape.rows;
  head.depth = shape.depth;
  head.tokens = shape.tokens;
  head.low = shape.low;
  head.high = shape.high;
  head.temperature = shape.temperature;
  if (bias) {
    in.bias.resize(head.tokens);
    for (int64_t v = 0; v < head.tokens; ++v) in.bias[v] = float_at(*bias, v * bias->stride(0));
    head.bias = in.bias.data();
  }
  return in;
}

void add_targets(HeadInputs& in, const Tensor& targets, const Tensor& hidden) {
  check_head_targets(targets, hidden);
  in.head.targets = targets.const_data_ptr<int64_t>();
  in.head.target_stride = targets.stride(0);
  for (int64_t i = 0; i < in.head.rows; ++i) {
    const int64_t target = in.head.targets[i * in.head.target_stride];
    RLIR_CHECK(target >= 0 && target < in.head.tokens,
               "selected_logprob: targets must be from 0 and below ", in.head.tokens, ", got ",
               target);
  }
}

void add_support(HeadInputs& in, const std::optional<Tensor>& support, const Tensor& hidden) {
  if (!support) return;
  cpu::Head& head = in.head;
  check_head_support(*support, hidden, head.tokens);
  head.support = support->const_data_ptr<uint8_t>();
  head.support_stride = support->stride(0);
  const int64_t first = head.low / 8, last = (head.high - 1) / 8;
  for (int64_t row = 0; row < head.rows; ++row) {
    const uint8_t* mask = head.support + row * head.support_stride;
    uint8_t any = 0;
    for (int64_t i = first; i <= last && any == 0; ++i) {
      uint8_t bits = mask[i];
      if (i == first) bits &= static_cast<uint8_t>(0xff << head.low % 8);
      if (i == last) bits &= static_cast<uint8_t>(0xff >> (7 - (head.high - 1) % 8));
      any |= bits;
    }
    RLIR_CHECK(any != 0,
               "selected_logprob: support must hold a token of vocab_range in every row, got none "
               "in row ",
               row);
  }
}

STABLE_TORCH_LIBRARY_FRAGMENT(rlir, m) {
  m.def(kSelectedLogprobSchema, {at::Tag::pt2_compliant_tag});
  m.def(kHeadLogitsSchema, {at::Tag::pt2_compliant_tag});
  m.def(kSelectedSupportSchema, {at::Tag::pt2_compliant_tag});
}

STABLE_TORCH_LIBRARY_IMPL(rlir, CPU, m) {
  m.impl("selected_logprob", TORCH_BOX(&selected_logprob_cpu));
  m.impl("head_logits", TORCH_BOX(&head_logits_cpu));
  m.impl("selected_support", TORCH_BOX(&selected_support_cpu));
}

}  // namespace rlir
