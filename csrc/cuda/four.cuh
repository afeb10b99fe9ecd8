// Four neighbouring elements of any number format, read and written in one access each where they
// lie so that this is possible: 16 bytes of float32, two times 16 of float64, 8 of the 16 bit
// formats. Elsewhere one by one.
#pragma once

#include "core/dtype.h"
#include "cuda/portable.cuh"

namespace rlir::cuda {
namespace {

template <typename T, typename Real>
__device__ __forceinline__ void load_each(const void* from, int64_t at, int n, Real (&out)[4]) {
  const T* x = static_cast<const T*>(from) + at;
#pragma unroll
  for (int c = 0; c < 4; ++c) out[c] = c < n ? static_cast<Real>(load(x + c)) : Real(0);
}

template <typename T, typename Real>
__device__ __forceinline__ void load_half(const void* from, int64_t at, Real (&out)[4]) {
  const uint2 q = *reinterpret_cast<const uint2*>(static_cast<const T*>(from) + at);
  const T x[4] = {T{static_cast<uint16_t>(q.x)}, T{static_cast<uint16_t>(q.x >> 16)},
                  T{static_cast<uint16_t>(q.y)}, T{static_cast<uint16_t>(q.y >> 16)}};
#pragma unroll
  for (int c = 0; c < 4; ++c) out[c] = static_cast<Real>(load(x + c));
}

// Elements at .. at + 3 as Real; those from the n-th on are 0. kWide: n is 4 or 0, and elements lie
// where they can be accessed together.
template <bool kWide, typename Real>
__device__ __forceinline__ void load4(const void* from, Dtype dtype, int64_t at, int n,
                                      Real (&out)[4]) {
  if constexpr (kWide) {
    out[0] = out[1] = out[2] = out[3] = Real(0);
    if (n == 0) return;
    if (dtype == Dtype::kFloat32) {
      const float4 q = *reinterpret_cast<const float4*>(static_cast<const float*>(from) + at);
      out[0] = q.x, out[1] = q.y, out[2] = q.z, out[3] = q.w;
    } else if (dtype == Dtype::kBFloat16) {
      load_half<BFloat16>(from, at, out);
    } else if (dtype == Dtype::kFloat16) {
      load_half<Float16>(from, at, out);
    } else {
      const double2* x = reinterpret_cast<const double2*>(static_cast<const double*>(from) + at);
      const double2 p = x[0], q = x[1];
      out[0] = static_cast<Real>(p.x), out[1] = static_cast<Real>(p.y);
      out[2] = static_cast<Real>(q.x), out[3] = static_cast<Real>(q.y);
    }
  } else {
    switch (dtype) {
      case Dtype::kFloat64:
        return load_each<double>(from, at, n, out);
      case Dtype::kFloat32:
        return load_each<float>(from, at, n, out);
      case Dtype::kBFloat16:
        return load_each<BFloat16>(from, at, n, out);
      case Dtype::kFloat16:
        return load_each<Float16>(from, at, n, out);
    }
  }
}

// __stcg: a plain store of the vector would be taken apart by the compiler.
template <bool kWide>
__device__ __forceinline__ void store4(float* to, int n, const float (&x)[4]) {
  if constexpr (kWide) {
    if (n == 4) __stcg(reinterpret_cast<float4*>(to), make_float4(x[0], x[1], x[2], x[3]));
  } else {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      if (c < n) to[c] = x[c];
    }
  }
}

template <bool kWide>
__device__ __forceinline__ void store4(double* to, int n, const double (&x)[4]) {
  if constexpr (kWide) {
    if (n == 0) return;
    __stcg(reinterpret_cast<double2*>(to), make_double2(x[0], x[1]));
    __stcg(reinterpret_cast<double2*>(to) + 1, make_double2(x[2], x[3]));
  } else {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      if (c < n) to[c] = x[c];
    }
  }
}

template <bool kWide, typename T, typename Real>
__device__ __forceinline__ void round_half(void* to, int64_t at, int n, Real (&x)[4]) {
  T half[4];
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    store(half + c, x[c]);
    x[c] = static_cast<Real>(load(half + c));
  }
  T* out = static_cast<T*>(to) + at;
  if constexpr (kWide) {
    const auto pair = [&](int c) {
      return static_cast<uint32_t>(half[c].bits) | static_cast<uint32_t>(half[c + 1].bits) << 16;
    };
    if (n == 4) __stcg(reinterpret_cast<uint2*>(out), make_uint2(pair(0), pair(2)));
  } else {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      if (c < n) out[c] = half[c];
    }
  }
}

// Stores and makes x what was stored, so that scoring it later gives the same bits.
template <bool kWide, typename Real>
__device__ __forceinline__ void store_rounded(void* to, Dtype dtype, int64_t at, int n,
                                              Real (&x)[4]) {
  if (dtype == Dtype::kBFloat16) {
    round_half<kWide, BFloat16>(to, at, n, x);
  } else if (dtype == Dtype::kFloat16) {
    round_half<kWide, Float16>(to, at, n, x);
  } else if (dtype == Dtype::kFloat64) {
    const double y[4] = {x[0], x[1], x[2], x[3]};
    store4<kWide>(static_cast<double*>(to) + at, n, y);
  } else {
    float y[4];
#pragma unroll
    for (int c = 0; c < 4; ++c) x[c] = y[c] = static_cast<float>(x[c]);
    store4<kWide>(static_cast<float*>(to) + at, n, y);
  }
}

// Whether four elements at a time can be read; null pointers say nothing against it.
template <typename... Pointers>
inline bool can_be_four(int64_t size, Pointers... p) {
  return size % 4 == 0 && ((reinterpret_cast<uintptr_t>(p) % 16 == 0) && ...);
}

}  // namespace
}  // namespace rlir::cuda
