// What the ops of selected_logprob share: inputs checked and described for the kernels.
#pragma once

#include "cpu/selected_logprob.h"

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "core/cpu_isa.h"
#include "core/scratch.h"
#include "ops/head_checks.h"

namespace rlir {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A Head and what it points to beyond the operands.
struct HeadInputs {
  cpu::Head head{};
  std::vector<float> bias;

  int64_t first_block() const { return head.low / cpu::kHeadBlock; }
  int64_t last_block() const { return (head.high - 1) / cpu::kHeadBlock + 1; }
};

// Checks and describes hidden [N, H], weight [V, H], bias [V] and the vocab_range. `op` is for the
// messages.
HeadInputs head_inputs(const char* op, const Tensor& hidden, const Tensor& weight,
                       const std::optional<Tensor>& bias, double temperature, int64_t low,
                       std::optional<int64_t> high);

// Adds targets int64 [N], 0 <= target < V.
void add_targets(HeadInputs& inputs, const Tensor& targets, const Tensor& hidden);

// Adds a support uint8 [N, ceil(V / 8)], the last dimension contiguous.
void add_support(HeadInputs& inputs, const std::optional<Tensor>& support, const Tensor& hidden);

// Calls f(panel_begin, panel_end, block_begin, block_end) for whole groups of panels and ranges of
// the blocks, on several threads. What f computes must not depend on how they are cut.
template <typename F>
void for_tiles(int64_t rows, int64_t panel_rows, int64_t block_begin, int64_t block_end,
               const F& f) {
  const int64_t panels = (rows + panel_rows - 1) / panel_rows;
  const int64_t group = cpu::kHeadGroup / panel_rows;
  const int64_t groups = (panels + group - 1) / group, blocks = block_end - block_begin;
  const int64_t threads = torch::stable::get_num_threads();
  // Few rows: threads share the vocabulary as well.
  const int64_t wanted = (2 * threads + groups - 1) / groups;
  const int64_t parts = threads == 1 || groups >= 4 * threads ? 1 : std::min(blocks, wanted);
  torch::stable::parallel_for(0, groups * parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t panel = i / parts * group, part = i % parts;
      f(panel, std::min(panel + group, panels), block_begin + blocks * part / parts,
        block_begin + blocks * (part + 1) / parts);
    }
  });
}

}  // namespace rlir
