// rlir::rotary_append_: checks and CPU dispatch. Formulas: cpu/rotary_append.h.
#include "cpu/rotary_append.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <vector>

#include "core/cpu_isa.h"
#include "ops/rotary.h"
#include "ops/row_args.h"

namespace rlir {
namespace {

using torch::stable::Tensor;

// Nothing is written before all are known to be right. Two tokens of a row at one slot would race.
void check_positions(const Tensor& positions, int64_t batch, int64_t tokens, int64_t limit) {
  const int64_t* row = positions.const_data_ptr<int64_t>();
  std::vector<int64_t> sorted;
  for (int64_t b = 0; b < batch; ++b, row += tokens) {
    bool rising = true;
    for (int64_t t = 0; t < tokens; ++t) {
      RLIR_CHECK(row[t] >= 0 && row[t] < limit,
                 "rotary_append_: positions must be from 0 and below ", limit, ", got ", row[t]);
      rising = rising && (t == 0 || row[t - 1] < row[t]);
    }
    if (rising) continue;
    sorted.assign(row, row + tokens);
    std::sort(sorted.begin(), sorted.end());
    const auto twice = std::adjacent_find(sorted.begin(), sorted.end());
    if (twice != sorted.end()) {
      fail("rotary_append_: positions of a row must differ, got ", *twice, " twice");
    }
  }
}

Tensor rotary_append_cpu(const Tensor& query, const Tensor& key, const Tensor& value,
                         const Tensor& cosine, const Tensor& sine, const Tensor& cache_k,
                         const Tensor& cache_v, const Tensor& positions, bool interleaved) {
  RLIR_CHECK(query.is_cpu(), "rotary_append_: q must be on the CPU, got another device");
  RotaryAppendCall call =
      rotary_append_call(query, key, value, cosine, sine, cache_k, cache_v, positions, interleaved);
  cpu::RotaryAppend& a = call.args;
  const int64_t batch = query.size(0);
  check_positions(positions, batch, a.tokens, call.limit);
  Tensor out =
      torch::stable::new_empty(query, {batch, a.tokens, a.heads, a.dim}, cache_k.scalar_type());
  a.q = call.q.const_data_ptr();
  a.k = call.k.const_data_ptr();
  a.v = call.v.const_data_ptr();
  a.positions = positions.const_data_ptr<int64_t>();
  a.out = out.mutable_data_ptr();
  a.cache_k = cache_k.mutable_data_ptr();
  a.cache_v = cache_v.mutable_data_ptr();
  const auto kernel = RLIR_CPU_KERNEL(rotary_append);
  torch::stable::parallel_for(0, batch * a.tokens,
                              rows_per_task((a.heads + 2 * a.kv_heads) * a.dim),
                              [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(rlir, m) { m.def(kRotaryAppendSchema, {at::Tag::pt2_compliant_tag}); }

STABLE_TORCH_LIBRARY_IMPL(rlir, CPU, m) { m.impl("rotary_append_", TORCH_BOX(&rotary_append_cpu)); }

}  // namespace rlir
