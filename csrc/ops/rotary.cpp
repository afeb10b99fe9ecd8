// rlir::rotary: checks and CPU dispatch. Formulas: cpu/rotary.h.
#include "cpu/rotary.h"

#include <torch/csrc/stable/library.h>

#include "core/cpu_isa.h"
#include "ops/rotary.h"
#include "ops/row_args.h"

namespace rlir {
namespace {

using torch::stable::Tensor;

Tensor rotary_cpu(const Tensor& input, const Tensor& cosine, const Tensor& sine, bool interleaved,
                  bool transposed) {
  RLIR_CHECK(input.is_cpu(), "rotary: x must be on the CPU, got another device");
  check_rotary("rotary: x", input, input);
  const Tensor x = rotary_rows(input);
  cpu::Rotary a = rotary_call(x, cosine, sine, interleaved, transposed);
  const int64_t batch = x.size(0);
  Tensor out = torch::stable::new_empty(x, {batch, a.tokens, a.heads, a.dim});
  a.x = x.const_data_ptr();
  a.out = out.mutable_data_ptr();
  const auto kernel = RLIR_CPU_KERNEL(rotary);
  torch::stable::parallel_for(0, batch * a.tokens, rows_per_task(a.heads * a.dim),
                              [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(rlir, m) { m.def(kRotarySchema, {at::Tag::pt2_compliant_tag}); }

STABLE_TORCH_LIBRARY_IMPL(rlir, CPU, m) { m.impl("rotary", TORCH_BOX(&rotary_cpu)); }

}  // namespace rlir
