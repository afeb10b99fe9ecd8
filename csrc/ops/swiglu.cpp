// rlir::swiglu and its backward: schemas, checks and CPU dispatch. Formulas: cpu/swiglu.h.
#include "cpu/swiglu.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

#include "core/cpu_isa.h"
#include "ops/row_args.h"

namespace rlir {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Where the elements of gate and up are: two tensors, or the halves of one.
struct Operands {
  Tensor gate;
  std::optional<Tensor> up;
  int64_t rows, size;
  Dtype dtype;

  Operands(const Tensor& first, const std::optional<Tensor>& second)
      : gate(rows_of("swiglu: gate", first)) {
    rows = gate.size(0);
    dtype = float_dtype("swiglu: gate", gate);
    if (second) {
      up = rows_of("swiglu: up", *second);
      check_same_rows("swiglu: up", *up, gate);
      RLIR_CHECK(up->scalar_type() == gate.scalar_type(),
                 "swiglu: up must have the dtype of gate, got dtype ",
                 static_cast<int>(up->scalar_type()));
    }
    RLIR_CHECK(second || gate.size(1) % 2 == 0,
               "swiglu: gate must hold two halves of one size, got ", gate.size(1), " elements");
    size = second ? gate.size(1) : gate.size(1) / 2;
  }
  int64_t element_size() const { return dtype == Dtype::kFloat32 ? 4 : 2; }
  const void* up_data() const {
    return up ? up->const_data_ptr()
              : static_cast<const char*>(gate.const_data_ptr()) + size * element_size();
  }
  int64_t up_stride() const { return up ? up->stride(0) : gate.stride(0); }
};

Tensor swiglu_cpu(const Tensor& gate, const std::optional<Tensor>& up, bool to_bfloat16) {
  const Operands in(gate, up);
  const ScalarType dtype = to_bfloat16 ? ScalarType::BFloat16 : ScalarType::Float;
  Tensor out = torch::stable::new_empty(in.gate, {in.rows, in.size}, dtype);
  cpu::Swiglu a{};
  a.gate = in.gate.const_data_ptr();
  a.up = in.up_data();
  a.dtype = in.dtype;
  a.gate_stride = in.gate.stride(0);
  a.up_stride = in.up_stride();
  a.out = out.mutable_data_ptr();
  a.out_dtype = to_bfloat16 ? Dtype::kBFloat16 : Dtype::kFloat32;
  a.size = in.size;
  const auto kernel = RLIR_CPU_KERNEL(swiglu);
  torch::stable::parallel_for(0, in.rows, rows_per_task(in.size),
                              [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
  return out;
}

// One tensor of both gradients where gate holds both halves; the second is empty then.
std::tuple<Tensor, Tensor> swiglu_backward_cpu(const Tensor& grad, const Tensor& gate,
                                               const std::optional<Tensor>& up) {
  const Operands in(gate, up);
  const Tensor dy = rows_of("swiglu: the gradient", grad);
  RLIR_CHECK(dy.size(0) == in.rows && dy.size(1) == in.size, "swiglu: the gradient must be [",
             in.rows, ", ", in.size, "], got [", dy.size(0), ", ", dy.size(1), "]");
  Tensor dgate = torch::stable::new_empty(in.gate, {in.rows, in.gate.size(1)});
  Tensor dup = torch::stable::new_empty(in.gate, {up ? in.rows : 0, in.size});
  cpu::SwigluBackward a{};
  a.gate = in.gate.const_data_ptr();
  a.up = in.up_data();
  a.dy = dy.const_data_ptr();
  a.dtype = in.dtype;
  a.dy_dtype = float_dtype("swiglu: the gradient", dy);
  a.gate_stride = in.gate.stride(0);
  a.up_stride = in.up_stride();
  a.dy_stride = dy.stride(0);
  a.dgate = dgate.mutable_data_ptr();
  a.dup = up ? dup.mutable_data_ptr()
             : static_cast<char*>(dgate.mutable_data_ptr()) + in.size * in.element_size();
  a.dgate_stride = in.gate.size(1);
  a.dup_stride = up ? in.size : in.gate.size(1);
  a.size = in.size;
  const auto kernel = RLIR_CPU_KERNEL(swiglu_backward);
  torch::stable::parallel_for(0, in.rows, rows_per_task(in.size),
                              [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
  return {dgate, dup};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(rlir, m) {
  m.def("swiglu(Tensor gate, Tensor? up=None, *, bool to_bfloat16) -> Tensor",
        {at::Tag::pt2_compliant_tag});
  m.def("swiglu_backward(Tensor grad, Tensor gate, Tensor? up=None) -> (Tensor, Tensor)",
        {at::Tag::pt2_compliant_tag});
}

STABLE_TORCH_LIBRARY_IMPL(rlir, CPU, m) {
  m.impl("swiglu", TORCH_BOX(&swiglu_cpu));
  m.impl("swiglu_backward", TORCH_BOX(&swiglu_backward_cpu));
}

}  // namespace rlir
