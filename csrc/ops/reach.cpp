// rlir::_reach(mask, numbers, positions [n], keys) -> bool [n, keys]: what core/reach.h lets
// queries see, for tests.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <string>
#include <vector>

#include "ops/attention_mask.h"

namespace rlir {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Tensor reach(std::string kind, std::vector<int64_t> numbers, const Tensor& positions,
             int64_t keys) {
  const AttentionMask mask = attention_mask("_reach", kind, numbers);
  RLIR_CHECK(positions.dim() == 1 && positions.is_contiguous() &&
                 positions.scalar_type() == ScalarType::Long && keys >= 0,
             "_reach: positions must be contiguous int64 [n] and keys >= 0, got otherwise");
  const int64_t n = positions.size(0);
  Tensor out = torch::stable::new_empty(positions, {n, keys}, ScalarType::Bool);
  bool* seen = out.mutable_data_ptr<bool>();
  for (int64_t i = 0; i < n; ++i) {
    const Reach r = reach_of(mask, positions.const_data_ptr<int64_t>()[i], keys);
    for (int64_t k = 0; k < keys; ++k) *seen++ = sees_slot(mask, r, k);
  }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(rlir, m) {
  m.def("_reach(str mask, int[] numbers, Tensor positions, int keys) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(rlir, CPU, m) { m.impl("_reach", TORCH_BOX(&reach)); }

}  // namespace rlir
