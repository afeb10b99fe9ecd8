// rlir::rms_norm and its backward: schemas, checks and CPU dispatch. Formulas: cpu/rms_norm.h.
#include "cpu/rms_norm.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>

#include "core/cpu_isa.h"
#include "core/scratch.h"
#include "ops/row_args.h"

namespace rlir {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

int64_t padded_bytes(int64_t size) { return (size + 15) / 16 * 16 * int64_t{sizeof(float)}; }

const float* weight_of(const Tensor& weight, int64_t size) {
  RLIR_CHECK(weight.is_cpu() && weight.is_contiguous() && weight.dim() == 1 &&
                 weight.size(0) == size && weight.scalar_type() == ScalarType::Float,
             "rms_norm: weight must be contiguous float32 [", size, "] on the CPU, got otherwise");
  return weight.const_data_ptr<float>();
}

std::tuple<Tensor, Tensor> rms_norm_cpu(const Tensor& input, const Tensor& weight, double eps,
                                        bool to_bfloat16) {
  const Tensor x = rows_of("rms_norm: x", input);
  const int64_t rows = x.size(0), size = x.size(1);
  RLIR_CHECK(size > 0, "rms_norm: x must have an element a row, got none");
  const ScalarType dtype = to_bfloat16 ? ScalarType::BFloat16 : ScalarType::Float;
  Tensor out = torch::stable::new_empty(x, {rows, size}, dtype);
  Tensor scale = torch::stable::new_empty(x, {rows}, ScalarType::Float);
  cpu::RmsNorm a{};
  a.x = x.const_data_ptr();
  a.x_dtype = float_dtype("rms_norm: x", x);
  a.x_stride = x.stride(0);
  a.weight = weight_of(weight, size);
  a.out = out.mutable_data_ptr();
  a.out_dtype = to_bfloat16 ? Dtype::kBFloat16 : Dtype::kFloat32;
  a.scale = scale.mutable_data_ptr<float>();
  a.size = size;
  a.eps = static_cast<float>(eps);
  const auto kernel = RLIR_CPU_KERNEL(rms_norm);
  torch::stable::parallel_for(0, rows, rows_per_task(size), [&](int64_t begin, int64_t end) {
    const Scratch scratch(padded_bytes(size));
    kernel(a, begin, end, scratch.get<float>());
  });
  return {out, scale};
}

std::tuple<Tensor, Tensor> rms_norm_backward_cpu(const Tensor& grad, const Tensor& input,
                                                 const Tensor& weight, const Tensor& scale,
                                                 bool need_x, bool need_weight) {
  const Tensor x = rows_of("rms_norm: x", input), dy = rows_of("rms_norm: the gradient", grad);
  check_same_rows("rms_norm: the gradient", dy, x);
  const int64_t rows = x.size(0), size = x.size(1);
  const int64_t blocks = (rows + cpu::kNormBlock - 1) / cpu::kNormBlock;
  RLIR_CHECK(scale.is_cpu() && scale.is_contiguous() && scale.numel() == rows &&
                 scale.scalar_type() == ScalarType::Float,
             "rms_norm: scale must be contiguous float32 [", rows, "], got otherwise");
  Tensor dx = torch::stable::new_empty(x, {need_x ? rows : 0, size});
  Tensor dw = torch::stable::new_empty(weight, {need_weight ? size : 0});
  const Scratch partials(need_weight ? blocks * size * int64_t{sizeof(float)} : 0);
  cpu::RmsNormBackward a{};
  a.x = x.const_data_ptr();
  a.dy = dy.const_data_ptr();
  a.x_dtype = float_dtype("rms_norm: x", x);
  a.dy_dtype = float_dtype("rms_norm: the gradient", dy);
  a.x_stride = x.stride(0);
  a.dy_stride = dy.stride(0);
  a.weight = weight_of(weight, size);
  a.scale = scale.const_data_ptr<float>();
  a.dx = need_x ? dx.mutable_data_ptr() : nullptr;
  a.partials = need_weight ? partials.get<float>() : nullptr;
  a.rows = rows;
  a.size = size;
  const auto kernel = RLIR_CPU_KERNEL(rms_norm_backward);
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    const Scratch scratch(2 * padded_bytes(size));
    kernel(a, begin, end, scratch.get<float>());
  });
  if (need_weight) {
    RLIR_CPU_KERNEL(rms_norm_weight)(a.partials, blocks, size, dw.mutable_data_ptr<float>(), 0,
                                     size);
  }
  return {dx, dw};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(rlir, m) {
  m.def("rms_norm(Tensor x, Tensor weight, *, float eps, bool to_bfloat16) -> (Tensor, Tensor)",
        {at::Tag::pt2_compliant_tag});
  m.def(
      "rms_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor scale, *, bool need_x, "
      "bool need_weight) -> (Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
}

STABLE_TORCH_LIBRARY_IMPL(rlir, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm_cpu));
  m.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward_cpu));
}

}  // namespace rlir
