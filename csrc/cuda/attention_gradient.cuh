// What the gradients of attention share on tensor cores. Formulas: video_attention_backward.cu.
#pragma once

#include "cuda/attention.cuh"
#include "cuda/video_attention_backward.cuh"

namespace rlir::cuda {
namespace {

__device__ __forceinline__ Span joined(const Span& x, const Span& y) {
  return {min(x.low, y.low), max(x.high, y.high), max(x.whole_low, y.whole_low),
          min(x.whole_high, y.whole_high)};
}

// 16 rows of a warp, in bfloat16, by way of its rows of a tile in shared memory: row r to
// to + place(r), or nowhere where that is negative.
template <int D, typename Place>
__device__ __forceinline__ void store_rows(unsigned char* tile, const float (&x)[D / 8][4],
                                           float scale, void* to, const Place& place) {
  const int warp_row = threadIdx.x / 32 * 16, lane = threadIdx.x % 32;
#pragma unroll
  for (int n = 0; n < D / 8; ++n) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t at = tile_at<D>(warp_row + 8 * half + lane / 4, n) + lane % 4 * 4;
      *reinterpret_cast<uint32_t*>(tile + at) =
          ptx::pack_bf16(x[n][2 * half] * scale, x[n][2 * half + 1] * scale);
    }
  }
  __syncwarp();
#pragma unroll
  for (int e = lane; e < 16 * D / 8; e += 32) {
    const int row = warp_row + e / (D / 8), chunk = e % (D / 8);
    const int64_t at = place(row);
    if (at < 0) continue;
    *reinterpret_cast<uint4*>(static_cast<uint16_t*>(to) + at + 8 * chunk) =
        *reinterpret_cast<const uint4*>(tile + tile_at<D>(row, chunk));
  }
}

}  // namespace
}  // namespace rlir::cuda
