// Four pairs of a head turned by a thread, for rotary and rotary_append: formulas in cpu/rotary.h,
// whose bits these are.
#pragma once

#include "cuda/four.cuh"

namespace rlir::cuda {
namespace {

__device__ __forceinline__ float load1(const void* x, Dtype dtype, int64_t at) {
  return dtype == Dtype::kFloat32 ? static_cast<const float*>(x)[at]
                                  : static_cast<float>(load(static_cast<const BFloat16*>(x) + at));
}

__device__ __forceinline__ void store1(void* x, Dtype dtype, int64_t at, float value) {
  if (dtype == Dtype::kFloat32) {
    static_cast<float*>(x)[at] = value;
  } else {
    store(static_cast<BFloat16*>(x) + at, static_cast<double>(value));
  }
}

// Elements i and j are a pair, with their cos and sin.
__device__ __forceinline__ void rotate_pair(float& i, float& j, float ci, float cj, float si,
                                            float sj, bool transposed) {
  const float upper = j * (transposed ? sj : -si), lower = i * (transposed ? -si : sj);
  i = i * ci + upper;
  j = j * cj + lower;
}

// Pairs 4 quad .. of a head at x + at, cos and sin of its position; fewer where the head ends.
// kWide: D is a multiple of 8, and elements lie where four can be accessed together.
template <bool kWide>
__device__ __forceinline__ void rotate4(const void* x, Dtype dtype, int64_t at, const float* cosine,
                                        const float* sine, int64_t dim, int64_t quad,
                                        bool interleaved, bool transposed, void* out, Dtype to,
                                        int64_t out_at) {
  const int64_t half = dim / 2, left = half - 4 * quad;
  const int pairs = left < 4 ? static_cast<int>(left) : 4;
  if constexpr (!kWide) {
#pragma unroll 1
    for (int p = 0; p < pairs; ++p) {
      const int64_t pair = 4 * quad + p, i = interleaved ? 2 * pair : pair;
      const int64_t j = interleaved ? i + 1 : i + half;
      float first = load1(x, dtype, at + i), second = load1(x, dtype, at + j);
      rotate_pair(first, second, cosine[i], cosine[j], sine[i], sine[j], transposed);
      store1(out, to, out_at + i, first);
      store1(out, to, out_at + j, second);
    }
    return;
  }
  // Where two times four elements lie: the halves of pairs, or neighbours.
  const int64_t first = interleaved ? 8 * quad : 4 * quad;
  const int64_t second = interleaved ? first + 4 : first + half;
  float a[4], b[4], ca[4], cb[4], sa[4], sb[4];
  load4<true>(x, dtype, at + first, 4, a);
  load4<true>(x, dtype, at + second, 4, b);
  load4<true>(cosine, Dtype::kFloat32, first, 4, ca);
  load4<true>(cosine, Dtype::kFloat32, second, 4, cb);
  load4<true>(sine, Dtype::kFloat32, first, 4, sa);
  load4<true>(sine, Dtype::kFloat32, second, 4, sb);
  if (interleaved) {
#pragma unroll
    for (int c = 0; c < 4; c += 2) {
      rotate_pair(a[c], a[c + 1], ca[c], ca[c + 1], sa[c], sa[c + 1], transposed);
      rotate_pair(b[c], b[c + 1], cb[c], cb[c + 1], sb[c], sb[c + 1], transposed);
    }
  } else {
#pragma unroll
    for (int c = 0; c < 4; ++c) rotate_pair(a[c], b[c], ca[c], cb[c], sa[c], sb[c], transposed);
  }
  store_rounded<true>(out, to, out_at + first, 4, a);
  store_rounded<true>(out, to, out_at + second, 4, b);
}

// Threads that share a head.
inline __host__ __device__ int64_t rotary_quads(int64_t dim) { return (dim / 2 + 3) / 4; }

}  // namespace
}  // namespace rlir::cuda
