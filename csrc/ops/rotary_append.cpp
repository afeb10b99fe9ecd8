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

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

cpu::RotaryRows strides_of(const Tensor& x) { return {x.stride(0), x.stride(1), x.stride(2)}; }

// Each element needs memory of its own, contiguous in D: a cache cannot be copied.
void check_cache(const char* what, const Tensor& cache) {
  RLIR_CHECK(cache.stride(3) == 1, what, " must be contiguous in D, got stride ", cache.stride(3));
  for (int64_t d = 0; d < 3; ++d) {
    RLIR_CHECK(cache.size(d) <= 1 || cache.stride(d) != 0, what,
               " must have memory for each of its elements, got stride 0");
  }
}

// Nothing is written before all are known to be right. Two tokens of a row at one slot would race.
void check_positions(const Tensor& positions, int64_t batch, int64_t tokens, int64_t limit) {
  RLIR_CHECK(positions.is_cpu() && positions.scalar_type() == ScalarType::Long &&
                 positions.is_contiguous() && positions.dim() == 2 && positions.size(0) == batch &&
                 positions.size(1) == tokens,
             "rotary_append_: positions must be contiguous int64 [B, T], got otherwise");
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
  cpu::RotaryAppend a{};
  a.dtype = check_rotary("rotary_append_: q", query, query);
  check_rotary("rotary_append_: k", key, query);
  check_rotary("rotary_append_: v", value, query);
  check_rotary("rotary_append_: cache_k", cache_k, query);
  check_rotary("rotary_append_: cache_v", cache_v, query);
  const Tensor q = rotary_rows(query), k = rotary_rows(key), v = rotary_rows(value);
  const int64_t batch = q.size(0), tokens = q.size(1), heads = q.size(2), dim = q.size(3);
  const int64_t kv_heads = k.size(2), capacity = cache_k.size(1);
  check_rotary_sizes("rotary_append_: k", k, batch, tokens, kv_heads, dim);
  check_rotary_sizes("rotary_append_: v", v, batch, tokens, kv_heads, dim);
  check_rotary_sizes("rotary_append_: cache_k", cache_k, batch, capacity, kv_heads, dim);
  check_rotary_sizes("rotary_append_: cache_v", cache_v, batch, capacity, kv_heads, dim);
  check_cache("rotary_append_: cache_k", cache_k);
  check_cache("rotary_append_: cache_v", cache_v);
  a.cosine = rotary_table("rotary_append_: cos", cosine, q, 2);
  a.sine = rotary_table("rotary_append_: sin", sine, q, 2);
  RLIR_CHECK(sine.size(0) == cosine.size(0), "rotary_append_: sin must have ", cosine.size(0),
             " positions as cos has, got ", sine.size(0));
  check_positions(positions, batch, tokens, std::min(capacity, cosine.size(0)));
  Tensor out = torch::stable::new_empty(q, {batch, tokens, heads, dim});
  a.q = q.const_data_ptr();
  a.k = k.const_data_ptr();
  a.v = v.const_data_ptr();
  a.q_at = strides_of(q);
  a.k_at = strides_of(k);
  a.v_at = strides_of(v);
  a.positions = positions.const_data_ptr<int64_t>();
  a.out = out.mutable_data_ptr();
  a.cache_k = cache_k.mutable_data_ptr();
  a.cache_v = cache_v.mutable_data_ptr();
  a.cache_k_at = strides_of(cache_k);
  a.cache_v_at = strides_of(cache_v);
  a.tokens = tokens;
  a.heads = heads;
  a.kv_heads = kv_heads;
  a.dim = dim;
  a.interleaved = interleaved;
  const auto kernel = RLIR_CPU_KERNEL(rotary_append);
  torch::stable::parallel_for(0, batch * tokens, rows_per_task((heads + 2 * kv_heads) * dim),
                              [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(rlir, m) { m.def(kRotaryAppendSchema, {at::Tag::pt2_compliant_tag}); }

STABLE_TORCH_LIBRARY_IMPL(rlir, CPU, m) { m.impl("rotary_append_", TORCH_BOX(&rotary_append_cpu)); }

}  // namespace rlir
