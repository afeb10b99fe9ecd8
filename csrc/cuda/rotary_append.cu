// Why it looks like this: one launch for queries, keys and values, a block a token, a thread for
// four pairs of a head (cuda/rotate.cuh) or eight elements of a value.
#include "cuda/rotary_append.cuh"

#include "cuda/rotate.cuh"

namespace rlir::cuda {
namespace {

constexpr int kThreads = 128;

// Eight elements of a head, or those that are left: bit for bit, or rounded to another format.
template <bool kWide>
__device__ __forceinline__ void copy8(const void* from, Dtype dtype, int64_t at, int64_t dim,
                                      int64_t quad, void* to, Dtype to_dtype, int64_t to_at) {
  const int64_t first = 8 * quad, end = min(dim, first + 8);
  for (int64_t i = first; i < end; i += kWide ? 4 : 1) {
    if (dtype != to_dtype) {
      if constexpr (kWide) {
        float x[4];
        load4<true>(from, dtype, at + i, 4, x);
        store_rounded<true>(to, to_dtype, to_at + i, 4, x);
      } else {
        store1(to, to_dtype, to_at + i, load1(from, dtype, at + i));
      }
    } else if (dtype == Dtype::kFloat32) {
      const float* x = static_cast<const float*>(from) + at + i;
      float* y = static_cast<float*>(to) + to_at + i;
      if constexpr (kWide) {
        __stcg(reinterpret_cast<float4*>(y), *reinterpret_cast<const float4*>(x));
      } else {
        *y = *x;
      }
    } else {
      const uint16_t* x = static_cast<const uint16_t*>(from) + at + i;
      uint16_t* y = static_cast<uint16_t*>(to) + to_at + i;
      if constexpr (kWide) {
        __stcg(reinterpret_cast<uint2*>(y), *reinterpret_cast<const uint2*>(x));
      } else {
        *y = *x;
      }
    }
  }
}

__device__ __forceinline__ void undefined(const cpu::RotaryAppend& a, int64_t at, int64_t quad) {
  for (int64_t i = 8 * quad; i < a.dim && i < 8 * quad + 8; ++i) {
    if (a.to == Dtype::kFloat32) {
      static_cast<float*>(a.out)[at + i] = NAN;
    } else {
      static_cast<uint16_t*>(a.out)[at + i] = 0x7fc0;
    }
  }
}

template <bool kWide>
__global__ void __launch_bounds__(kThreads) append_kernel(cpu::RotaryAppend a, int64_t limit) {
  const int64_t n = blockIdx.x, b = n / a.tokens, t = n % a.tokens, slot = a.positions[n];
  const bool there = slot >= 0 && slot < limit;
  const int quads = static_cast<int>(rotary_quads(a.dim));
  const int heads = static_cast<int>(a.heads), kv_heads = static_cast<int>(a.kv_heads);
  const float *c = a.cosine + slot * a.dim, *s = a.sine + slot * a.dim;
  for (int i = threadIdx.x; i < (heads + 2 * kv_heads) * quads; i += kThreads) {
    const int quad = i % quads, head = i / quads;
    const auto at = [&](const cpu::RotaryRows& rows, int64_t token, int h) {
      return b * rows.batch + token * rows.token + h * rows.head;
    };
    if (!there) {
      if (head < heads) undefined(a, (n * heads + head) * a.dim, quad);
    } else if (head < heads) {
      rotate4<kWide>(a.q, a.dtype, at(a.q_at, t, head), c, s, a.dim, quad, a.interleaved, false,
                     a.out, a.to, (n * heads + head) * a.dim);
    } else if (head < heads + kv_heads) {
      const int h = head - heads;
      rotate4<kWide>(a.k, a.dtype, at(a.k_at, t, h), c, s, a.dim, quad, a.interleaved, false,
                     a.cache_k, a.to, at(a.cache_k_at, slot, h));
    } else {
      const int h = head - heads - kv_heads;
      copy8<kWide>(a.v, a.dtype, at(a.v_at, t, h), a.dim, quad, a.cache_v, a.to,
                   at(a.cache_v_at, slot, h));
    }
  }
  if (threadIdx.x == 0) {
    RLIR_DEVICE_ASSERT(there, "rotary_append_: positions must be in the cache and the tables");
  }
}

bool even(const cpu::RotaryRows& rows) { return (rows.batch | rows.token | rows.head) % 4 == 0; }

}  // namespace

int rotary_append(const cpu::RotaryAppend& a, int64_t all, int64_t limit, void* stream) {
  const bool strides =
      even(a.q_at) && even(a.k_at) && even(a.v_at) && even(a.cache_k_at) && even(a.cache_v_at);
  const bool wide =
      strides && a.dim % 8 == 0 &&
      can_be_four(a.dim, a.q, a.k, a.v, a.cosine, a.sine, a.out, a.cache_k, a.cache_v);
  const auto kernel = wide ? append_kernel<true> : append_kernel<false>;
  return launch(kernel, dim3(static_cast<unsigned>(all)), dim3(kThreads), 0, stream, a, limit);
}

}  // namespace rlir::cuda
