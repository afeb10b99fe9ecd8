// rlir::rotary on CUDA. Nothing here waits for the device.
#include "cuda/rotary.cuh"

#include <limits>

#include "ops/cuda_call.h"
#include "ops/rotary.h"

namespace rlir {
namespace {

using torch::stable::Tensor;

Tensor rotary_cuda(const Tensor& input, const Tensor& cosine, const Tensor& sine, bool interleaved,
                   bool transposed) {
  check_rotary("rotary: x", input, input);
  CudaCall call("rotary", input);
  const Tensor x = rotary_rows(input);
  cpu::Rotary a = rotary_call(x, cosine, sine, interleaved, transposed);
  const int64_t all = x.size(0) * a.tokens;
  RLIR_CHECK(all * a.heads * a.dim / 2048 < std::numeric_limits<int32_t>::max(),
             "rotary: x must have below 2^42 elements, got ", x.numel());
  Tensor out = torch::stable::new_empty(x, {x.size(0), a.tokens, a.heads, a.dim});
  if (all * a.heads == 0) return out;
  a.x = call.in(x, "x");
  call.in(cosine, "cos");
  call.in(sine, "sin");
  a.out = call.out(out, "the result");
  call.check(cuda::rotary(a, all, call.stream()));
  return out;
}

}  // namespace

RLIR_CUDA_OP("rotary", kRotarySchema, &rotary_cuda)

}  // namespace rlir
