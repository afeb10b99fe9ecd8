// rlir::rotary_append_ on CUDA. Nothing here waits for the device.
#include "cuda/rotary_append.cuh"

#include <limits>

#include "ops/cuda_call.h"
#include "ops/rotary.h"

namespace rlir {
namespace {

using torch::stable::Tensor;

Tensor rotary_append_cuda(const Tensor& query, const Tensor& key, const Tensor& value,
                          const Tensor& cosine, const Tensor& sine, const Tensor& cache_k,
                          const Tensor& cache_v, const Tensor& positions, bool interleaved) {
  RotaryAppendCall rows =
      rotary_append_call(query, key, value, cosine, sine, cache_k, cache_v, positions, interleaved);
  CudaCall call("rotary_append_", query);
  cpu::RotaryAppend& a = rows.args;
  const int64_t all = query.size(0) * a.tokens, heads = a.heads + 2 * a.kv_heads;
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  RLIR_CHECK(all <= kMost && heads * a.dim <= kMost,
             "rotary_append_: there must be below 2^31 tokens, and elements a token, got ", all,
             " and ", heads * a.dim);
  Tensor out = torch::stable::new_empty(query, {query.size(0), a.tokens, a.heads, a.dim},
                                        cache_k.scalar_type());
  if (all * heads == 0) return out;
  Tensor to_k = cache_k, to_v = cache_v;
  a.q = call.in(rows.q, "q");
  a.k = call.in(rows.k, "k");
  a.v = call.in(rows.v, "v");
  call.in(cosine, "cos");
  call.in(sine, "sin");
  a.positions = static_cast<const int64_t*>(call.in(positions, "positions"));
  a.out = call.out(out, "the rotated q");
  a.cache_k = call.in_out(to_k, "cache_k");
  a.cache_v = call.in_out(to_v, "cache_v");
  call.check(cuda::rotary_append(a, all, rows.limit, call.stream()));
  return out;
}

}  // namespace

RLIR_CUDA_OP("rotary_append_", kRotaryAppendSchema, &rotary_append_cuda)

}  // namespace rlir
