// rlir::selected_logprob, rlir::head_logits and rlir::selected_support: schemas, checks and CPU
// dispatch. Formulas and tiles: cpu/selected_logprob.h.
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

Matrix matrix_of(const char* op, const char* name, const Tensor& x) {
  RLIR_CHECK(x.is_cpu(), op, ": ", name, " must be on the CPU, got another device");
  RLIR_CHECK(x.dim() == 2, op, ": ", name, " must have 2 dimensions, got ", x.dim());
  const ScalarType dtype = x.scalar_type();
  RLIR_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, op, ": ", name,
             " must be float32 or bfloat16, got dtype ", static_cast<int>(dtype));
  return {x.const_data_ptr(), dtype == ScalarType::Float ? Dtype::kFloat32 : Dtype::kBFloat16,
          x.stride(0), x.stride(1)};
}

// What head_blocks and its like run on: hidden in panels.
Scratch packed(HeadInputs& in, const cpu::HeadSizes& sizes) {
  Scratch panels(sizes.panels);
  in.head.panels = panels.get();
  const auto pack = RLIR_CPU_KERNEL_BF16(head_pack);
  torch::stable::parallel_for(0, sizes.padded / sizes.panel_rows, 4,
                              [&](int64_t begin, int64_t end) { pack(in.head, begin, end); });
  return panels;
}

std::tuple<Tensor, Tensor, Tensor> selected_logprob_cpu(
    const Tensor& hidden, const Tensor& weight, const Tensor& targets,
    const std::optional<Tensor>& bias, const std::optional<Tensor>& support, double temperature,
    int64_t low, std::optional<int64_t> high, bool compute_entropy) {
  HeadInputs in = head_inputs("selected_logprob", hidden, weight, bias, temperature, low, high);
  add_targets(in, targets);
  add_support(in, support);
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

  const cpu::HeadSizes sizes = RLIR_CPU_KERNEL_BF16(head_sizes)(head);
  const Scratch panels = packed(in, sizes);
  const int64_t blocks = in.last_block() - in.first_block();
  const Scratch sums(3 * blocks * sizes.padded * 4), target_z(sizes.padded * 4);
  head.block_max = sums.get<float>();
  head.block_sum = head.block_max + blocks * sizes.padded;
  head.block_dot = head.block_sum + blocks * sizes.padded;
  head.target_z = target_z.get<float>();
  const auto tiles = RLIR_CPU_KERNEL_BF16(head_blocks);
  for_tiles(n, sizes.panel_rows, in.first_block(), in.last_block(),
            [&](int64_t p0, int64_t p1, int64_t b0, int64_t b1) {
              const Scratch scratch(sizes.scratch);
              tiles(head, p0, p1, b0, b1, scratch.get());
            });
  const auto rows = RLIR_CPU_KERNEL_BF16(head_rows);
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
  const cpu::HeadSizes sizes = RLIR_CPU_KERNEL_BF16(head_sizes)(in.head);
  const Scratch panels = packed(in, sizes);
  const auto tiles = RLIR_CPU_KERNEL_BF16(head_logits);
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
  RLIR_CHECK(!top_k || *top_k >= 1, "selected_logprob: top_k must be >= 1, got ", *top_k);
  RLIR_CHECK(!top_p || (*top_p > 0 && *top_p <= 1),
             "selected_logprob: top_p must be in (0, 1], got ", *top_p);
  constexpr int64_t kMaxTokens = int64_t{1} << 21;  // cpu/truncation.h: sums stay exact
  RLIR_CHECK(in.head.tokens <= kMaxTokens,
             "selected_logprob: V with top_k or top_p must be at most ", kMaxTokens, ", got ",
             in.head.tokens);
  const int64_t n = in.head.rows, bytes = (in.head.tokens + 7) / 8;
  Tensor mask = torch::stable::new_empty(hidden, {n, bytes}, ScalarType::Byte);
  if (n == 0) return mask;
  const cpu::HeadSizes sizes = RLIR_CPU_KERNEL_BF16(head_sizes)(in.head);
  const Scratch panels = packed(in, sizes);
  const auto kernel = RLIR_CPU_KERNEL_BF16(head_support);
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
  HeadInputs in;
  cpu::Head& head = in.head;
  head.hidden = matrix_of(op, "hidden", hidden);
  head.weight = matrix_of(op, "weight", weight);
  head.rows = hidden.size(0);
  head.depth = hidden.size(1);
  head.tokens = weight.size(0);
  head.low = low;
  head.high = high.value_or(head.tokens);
  head.temperature = static_cast<float>(temperature);
  RLIR_CHECK(weight.size(1) == head.depth, op, ": weight must be [V, ", head.depth, "], got [",
             head.tokens, ", ", weight.size(1), "]");
  RLIR_CHECK(0 <= head.low && head.low < head.high && head.high <= head.tokens, op,
             ": vocab_range must satisfy 0 <= low < high <= ", head.tokens, ", got (", head.low,
             ", ", head.high, ")");
  RLIR_CHECK(std::isfinite(head.temperature) && head.temperature > 0, op,
             ": temperature must be finite and > 0, got ", temperature);
  if (bias) {
    RLIR_CHECK(bias->is_cpu(), op, ": bias must be on the CPU, got another device");
    RLIR_CHECK(
        bias->scalar_type() == ScalarType::Float || bias->scalar_type() == ScalarType::BFloat16, op,
        ": bias must be float32 or bfloat16, got dtype ", static_cast<int>(bias->scalar_type()));
    RLIR_CHECK(bias->dim() == 1 && bias->size(0) == head.tokens, op, ": bias must be [",
               head.tokens, "], got ", bias->numel(), " elements");
    in.bias.resize(head.tokens);
    for (int64_t v = 0; v < head.tokens; ++v) in.bias[v] = float_at(*bias, v * bias->stride(0));
    head.bias = in.bias.data();
  }
  return in;
}

void add_targets(HeadInputs& in, const Tensor& targets) {
  RLIR_CHECK(targets.is_cpu(), "selected_logprob: targets must be on the CPU, got another device");
  RLIR_CHECK(targets.scalar_type() == ScalarType::Long,
             "selected_logprob: targets must be int64, got dtype ",
             static_cast<int>(targets.scalar_type()));
  RLIR_CHECK(targets.dim() == 1 && targets.size(0) == in.head.rows,
             "selected_logprob: targets must be [", in.head.rows, "], got ", targets.numel(),
             " elements");
  in.head.targets = targets.const_data_ptr<int64_t>();
  in.head.target_stride = targets.stride(0);
  for (int64_t i = 0; i < in.head.rows; ++i) {
    const int64_t target = in.head.targets[i * in.head.target_stride];
    RLIR_CHECK(target >= 0 && target < in.head.tokens,
               "selected_logprob: targets must be from 0 and below ", in.head.tokens, ", got ",
               target);
  }
}

void add_support(HeadInputs& in, const std::optional<Tensor>& support) {
  if (!support) return;
  cpu::Head& head = in.head;
  RLIR_CHECK(support->is_cpu(), "selected_logprob: support must be on the CPU, got another device");
  RLIR_CHECK(support->scalar_type() == ScalarType::Byte,
             "selected_logprob: support must be uint8, got dtype ",
             static_cast<int>(support->scalar_type()));
  const int64_t bytes = (head.tokens + 7) / 8;
  RLIR_CHECK(support->dim() == 2 && support->size(0) == head.rows && support->size(1) == bytes,
             "selected_logprob: support must be [", head.rows, ", ", bytes, "], got ",
             support->numel(), " elements");
  RLIR_CHECK(support->stride(1) == 1 || bytes == 1,
             "selected_logprob: support must be contiguous along V, got stride ",
             support->stride(1));
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
  m.def(
      "selected_logprob(Tensor hidden, Tensor weight, Tensor targets, Tensor? bias=None, "
      "Tensor? support=None, *, float temperature=1.0, SymInt low=0, SymInt? high=None, "
      "bool compute_entropy=True) -> (Tensor, Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
  m.def("head_logits(Tensor hidden, Tensor weight, Tensor? bias=None) -> Tensor",
        {at::Tag::pt2_compliant_tag});
  m.def(
      "selected_support(Tensor hidden, Tensor weight, Tensor? bias=None, *, "
      "float temperature=1.0, SymInt? top_k=None, float? top_p=None, SymInt low=0, "
      "SymInt? high=None) -> Tensor",
      {at::Tag::pt2_compliant_tag});
}

STABLE_TORCH_LIBRARY_IMPL(rlir, CPU, m) {
  m.impl("selected_logprob", TORCH_BOX(&selected_logprob_cpu));
  m.impl("head_logits", TORCH_BOX(&head_logits_cpu));
  m.impl("selected_support", TORCH_BOX(&selected_support_cpu));
}

}  // namespace rlir
