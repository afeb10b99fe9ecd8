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
  cpu::Rotary a{};
  a.dtype = check_rotary("rotary: x", input, input);
  const Tensor x = rotary_rows(input);
  const int64_t batch = x.size(0), tokens = x.size(1), heads = x.size(2), dim = x.size(3);
  const int64_t dims = cosine.dim();
  RLIR_CHECK(dims == 2 || dims == 3, "rotary: cos must be [T, D] or [B, T, D], got ", dims,
             " dimensions");
  a.cosine = rotary_table("rotary: cos", cosine, x, dims);
  a.sine = rotary_table("rotary: sin", sine, x, dims);
  for (const Tensor* table : {&cosine, &sine}) {
    RLIR_CHECK(table->size(dims - 2) == tokens && (dims == 2 || table->size(0) == batch),
               "rotary: cos and sin must have the T and B of x, got otherwise");
  }
  Tensor out = torch::stable::new_empty(x, {batch, tokens, heads, dim});
  a.x = x.const_data_ptr();
  a.x_batch = x.stride(0);
  a.x_token = x.stride(1);
  a.x_head = x.stride(2);
  a.table_batch = dims == 2 ? 0 : tokens * dim;
  a.out = out.mutable_data_ptr();
  a.tokens = tokens;
  a.heads = heads;
  a.dim = dim;
  a.interleaved = interleaved;
  a.transposed = transposed;
  const auto kernel = RLIR_CPU_KERNEL(rotary);
  torch::stable::parallel_for(0, batch * tokens, rows_per_task(heads * dim),
                              [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(rlir, m) { m.def(kRotarySchema, {at::Tag::pt2_compliant_tag}); }

STABLE_TORCH_LIBRARY_IMPL(rlir, CPU, m) { m.impl("rotary", TORCH_BOX(&rotary_cpu)); }

}  // namespace rlir
