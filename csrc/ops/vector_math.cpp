// rlir::_exp and rlir::_log: the project's own exp and log, for tests. See cpu/vector_math.h.
#include "cpu/vector_math.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "core/check.h"
#include "core/cpu_isa.h"

namespace rlir {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Tensor exp_cpu(const Tensor& x) {
  RLIR_CHECK(x.scalar_type() == ScalarType::Float && x.is_contiguous(),
             "_exp: x must be contiguous float32, got other");
  Tensor out = torch::stable::empty_like(x);
  RLIR_CPU_KERNEL(vector_exp)
  (x.const_data_ptr<float>(), out.mutable_data_ptr<float>(), x.numel());
  return out;
}

Tensor log_cpu(const Tensor& x) {
  RLIR_CHECK(x.scalar_type() == ScalarType::Double && x.is_contiguous(),
             "_log: x must be contiguous float64, got other");
  Tensor out = torch::stable::empty_like(x);
  RLIR_CPU_KERNEL(vector_log)
  (x.const_data_ptr<double>(), out.mutable_data_ptr<double>(), x.numel());
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(rlir, m) {
  m.def("_exp(Tensor x) -> Tensor");
  m.def("_log(Tensor x) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(rlir, CPU, m) {
  m.impl("_exp", TORCH_BOX(&exp_cpu));
  m.impl("_log", TORCH_BOX(&log_cpu));
}

}  // namespace rlir
