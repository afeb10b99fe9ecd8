// Why it looks like this: memory is all that counts, so a thread takes four pairs, two accesses of
// four elements, and neighbours take what lies side by side.
#include "cuda/rotary.cuh"

#include "cuda/rotate.cuh"

namespace rlir::cuda {
namespace {

constexpr int kThreads = 256;

template <bool kWide>
__global__ void __launch_bounds__(kThreads) rotary_kernel(cpu::Rotary a, int64_t all) {
  const int64_t quads = rotary_quads(a.dim);
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= all * a.heads * quads) return;
  const int64_t row = i / quads, token = row / a.heads, head = row % a.heads;
  const int64_t b = token / a.tokens, t = token % a.tokens;
  const int64_t angle = b * a.table_batch + t * a.dim;
  rotate4<kWide>(a.x, a.dtype, b * a.x_batch + t * a.x_token + head * a.x_head, a.cosine + angle,
                 a.sine + angle, a.dim, i % quads, a.interleaved, a.transposed, a.out, a.dtype,
                 row * a.dim);
}

}  // namespace

int rotary(const cpu::Rotary& a, int64_t all, void* stream) {
  const bool strides = (a.x_batch | a.x_token | a.x_head) % 4 == 0;
  const bool wide = strides && a.dim % 8 == 0 && can_be_four(a.dim, a.x, a.cosine, a.sine, a.out);
  const int64_t threads = all * a.heads * rotary_quads(a.dim);
  const dim3 blocks(static_cast<unsigned>(ceil_div<int64_t>(threads, kThreads)));
  return launch(wide ? rotary_kernel<true> : rotary_kernel<false>, blocks, dim3(kThreads), 0,
                stream, a, all);
}

}  // namespace rlir::cuda
