// rlir::linear and its backward: schemas, checks and CPU dispatch. Formulas: cpu/linear.h.
#include "cpu/linear.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "core/cpu_isa.h"
#include "core/scratch.h"
#include "ops/row_args.h"

namespace rlir {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A task takes at least so many rows through a panel, which it packs itself: then packing is
// some percent of its work.
constexpr int64_t kTaskRows = 128;
constexpr int64_t kGroup = 16;  // rows packed together

// [index][k] of a matrix as it lies, and transposed.
Matrix along(const Tensor& x) {
  return {x.const_data_ptr(), float_dtype("linear: an operand", x), x.stride(0), 1};
}
Matrix across(const Tensor& x) {
  return {x.const_data_ptr(), float_dtype("linear: an operand", x), 1, x.stride(0)};
}

void run(cpu::LinearProduct p) {
  if (p.count == 0 || p.outputs == 0) return;
  const cpu::LinearSizes sizes = RLIR_CPU_KERNEL_BF16(linear_sizes)(p);
  const int64_t groups = (p.count + kGroup - 1) / kGroup;
  const Scratch packed(groups * kGroup * sizes.row);
  p.packed = packed.get();
  if (sizes.row > 0) {
    const auto pack = RLIR_CPU_KERNEL_BF16(linear_pack);
    torch::stable::parallel_for(0, groups,
                                std::max<int64_t>(1, 1024 / std::max<int64_t>(1, p.depth)),
                                [&](int64_t begin, int64_t end) {
                                  pack(p, begin * kGroup, std::min(end * kGroup, p.count));
                                });
  }
  // Threads share rows; where these are few, panels as well. What a task computes does not depend
  // on how they are cut.
  const int64_t threads = static_cast<int64_t>(torch::stable::get_num_threads());
  const int64_t rows = std::clamp<int64_t>(p.count / kTaskRows, 1, threads);
  const int64_t panels = std::clamp<int64_t>(threads / rows, 1, sizes.panels);
  const auto tiles = RLIR_CPU_KERNEL_BF16(linear_tiles);
  torch::stable::parallel_for(0, rows * panels, 1, [&](int64_t begin, int64_t end) {
    const Scratch scratch(sizes.scratch);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / panels, panel = i % panels;
      tiles(p, p.count * row / rows, p.count * (row + 1) / rows, sizes.panels * panel / panels,
            sizes.panels * (panel + 1) / panels, scratch.get());
    }
  });
}

cpu::LinearProduct product(const Matrix& rows, int64_t count, const Matrix& lanes, int64_t outputs,
                           int64_t depth, bool bfloat16, const Tensor& out) {
  cpu::LinearProduct p{};
  p.rows = rows;
  p.lanes = lanes;
  p.count = count;
  p.outputs = outputs;
  p.depth = depth;
  p.bfloat16 = bfloat16;
  p.out = out.mutable_data_ptr();
  p.out_dtype = float_dtype("linear: the result", out);
  return p;
}

bool is_bfloat16(const Tensor& x) { return x.scalar_type() == ScalarType::BFloat16; }

Tensor linear_cpu(const Tensor& input, const Tensor& matrix, const std::optional<Tensor>& bias,
                  bool to_bfloat16) {
  const Tensor x = rows_of("linear: x", input), w = rows_of("linear: weight", matrix);
  const int64_t n = x.size(0), k = x.size(1), o = w.size(0);
  RLIR_CHECK(w.size(1) == k, "linear: weight must be [N, ", k, "], got [", o, ", ", w.size(1), "]");
  const float* b = nullptr;
  if (bias) {
    RLIR_CHECK(bias->is_cpu() && bias->is_contiguous() && bias->dim() == 1 && bias->size(0) == o &&
                   bias->scalar_type() == ScalarType::Float,
               "linear: bias must be contiguous float32 [", o, "] on the CPU, got otherwise");
    b = bias->const_data_ptr<float>();
  }
  Tensor out =
      torch::stable::new_empty(x, {n, o}, to_bfloat16 ? ScalarType::BFloat16 : ScalarType::Float);
  const bool turned = n <= cpu::kLinearTurned;
  cpu::LinearProduct p = turned ? product(along(w), o, along(x), n, k, is_bfloat16(x), out)
                                : product(along(x), n, along(w), o, k, is_bfloat16(x), out);
  p.turned = turned;
  p.bias = b;
  run(p);
  return out;
}

std::tuple<Tensor, Tensor, Tensor> linear_backward_cpu(const Tensor& grad, const Tensor& input,
                                                       const Tensor& matrix, bool need_x,
                                                       bool need_weight, bool need_bias) {
  const Tensor x = rows_of("linear: x", input), w = rows_of("linear: weight", matrix);
  const Tensor dy = rows_of("linear: the gradient", grad);
  const int64_t n = x.size(0), k = x.size(1), o = w.size(0);
  RLIR_CHECK(w.size(1) == k, "linear: weight must be [N, ", k, "], got [", o, ", ", w.size(1), "]");
  RLIR_CHECK(dy.size(0) == n && dy.size(1) == o, "linear: the gradient must be [", n, ", ", o,
             "], got [", dy.size(0), ", ", dy.size(1), "]");
  const bool bfloat16 = is_bfloat16(x);
  Tensor dx = torch::stable::new_empty(x, {need_x ? n : 0, k});
  Tensor dw = torch::stable::new_empty(w, {need_weight ? o : 0, k});
  Tensor db = torch::stable::new_empty(w, {need_bias ? o : 0}, ScalarType::Float);
  if (need_x) run(product(along(dy), n, across(w), k, o, bfloat16, dx));
  if (need_weight) run(product(across(dy), o, across(x), k, n, bfloat16, dw));
  if (need_bias) {
    float* out = db.mutable_data_ptr<float>();
    const int64_t tasks = (o + cpu::kLinearColumns - 1) / cpu::kLinearColumns;
    const auto kernel = RLIR_CPU_KERNEL_BF16(linear_bias);
    torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
      kernel(across(dy), n, o, out, begin * cpu::kLinearColumns,
             std::min(end * cpu::kLinearColumns, o));
    });
  }
  return {dx, dw, db};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(rlir, m) {
  m.def("linear(Tensor x, Tensor weight, Tensor? bias=None, *, bool to_bfloat16) -> Tensor",
        {at::Tag::pt2_compliant_tag});
  m.def(
      "linear_backward(Tensor grad, Tensor x, Tensor weight, *, bool need_x, bool need_weight, "
      "bool need_bias) -> (Tensor, Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
}

STABLE_TORCH_LIBRARY_IMPL(rlir, CPU, m) {
  m.impl("linear", TORCH_BOX(&linear_cpu));
  m.impl("linear_backward", TORCH_BOX(&linear_backward_cpu));
}

}  // namespace rlir
