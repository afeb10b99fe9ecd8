// Why it looks like this: a block takes a chunk of a row, 16 threads a tile of 64 elements. Thread
// l draws Philox block l of the tile, whose four normals belong to elements l, l + 16, l + 32 and
// l + 48, but reads and writes elements 4 l to 4 l + 3, in one access each. Noise on its way in and
// squares on their way to accumulator l of 16 change hands in shared memory, within a warp. The
// accumulators of a chunk are added tile by tile and fold in the CPU's tree: the bits agree.
//
// A second kernel adds the chunks of a row in order. One that waits for the other blocks of its row
// would save the launch and need a counter that somebody clears.
#include "cuda/flow_sde_step.cuh"

#include "core/philox.h"
#include "cuda/portable.cuh"

namespace rlir::cuda {
namespace {

using cpu::flow_chunks;
using cpu::FlowCoefficients;
using cpu::kFlowChunk;

constexpr int kThreads = 256, kLanes = 16, kTiles = kThreads / kLanes;
constexpr int kTile = kNormalTile, kChunkTiles = kFlowChunk / kTile;
// Of a tile in shared memory: the two tiles of a warp lie in different banks.
constexpr int kTileStride = kTile + 16;
static_assert(kTile == 4 * kLanes && kChunkTiles % kTiles == 0);

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

__device__ __forceinline__ double number(const FlowNumbers& numbers, int64_t row) {
  double out[4];
  const int64_t at = row * numbers.stride;
  load4<false>(numbers.data, numbers.dtype, at, 1, out);
  return out[0];
}

// NaN where the sigmas are out of range: looking on the host would wait for the device.
__device__ __forceinline__ FlowCoefficients coefficients(const FlowNumbers& sigma,
                                                         const FlowNumbers& sigma_next,
                                                         const cpu::FlowNoise& noise, int64_t row) {
  const double now = number(sigma, row), next = number(sigma_next, row);
  if (cpu::flow_sigma_ok(now) && cpu::flow_next_ok(now, next)) {
    return cpu::flow_coefficients(noise, now, next);
  }
  const double nan = NAN;
  return {nan, nan, nan, nan, nan};
}

template <typename Real, bool kWide>
__global__ void __launch_bounds__(kThreads) step_kernel(FlowSdeStep a) {
  RLIR_SHARED(FlowCoefficients, shared_k, 1);
  RLIR_SHARED(Real, tiles, kTiles * kTileStride);
  RLIR_SHARED(Real, squares, kChunkTiles * kLanes);
  const int64_t chunks = flow_chunks(a.size);
  const int64_t row = blockIdx.x / chunks, begin = (blockIdx.x - row * chunks) * kFlowChunk;
  const int slot = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  if (threadIdx.x == 0) shared_k[0] = coefficients(a.sigma, a.sigma_next, a.noise, row);
  __syncthreads();
  const Real cx = static_cast<Real>(shared_k[0].sample);
  const Real cv = static_cast<Real>(shared_k[0].velocity);
  const Real deviation = static_cast<Real>(shared_k[0].std);
  const uint64_t seed = static_cast<uint64_t>(*a.seed), count = static_cast<uint64_t>(*a.offset);
  const uint64_t id =
      static_cast<uint64_t>(a.row_ids == nullptr ? row : a.row_ids[row * a.row_id_stride]);
  const PhiloxKey key = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
  const int64_t left = min(static_cast<int64_t>(kFlowChunk), a.size - begin);
  const int in_chunk = static_cast<int>((left + kTile - 1) / kTile);
  Real* const own = tiles + slot * kTileStride;

  for (int first = 0; first < in_chunk; first += kTiles) {
    const int tile = first + slot;
    if (a.previous == nullptr) {
      const uint32_t block = static_cast<uint32_t>(begin / kTile + tile) * kLanes + lane;
      const PhiloxBlock w =
          philox_block({block, static_cast<uint32_t>(count), static_cast<uint32_t>(id),
                        static_cast<uint32_t>(id >> 32)},
                       key);
      const NormalPair p = normal_pair(w.a, w.b), q = normal_pair(w.c, w.d);
      own[lane] = static_cast<Real>(p.a);
      own[lane + kLanes] = static_cast<Real>(p.b);
      own[lane + 2 * kLanes] = static_cast<Real>(q.a);
      own[lane + 3 * kLanes] = static_cast<Real>(q.b);
#if !defined(RLIR_FAULT_NOISE)
      __syncwarp();
#endif
    }
    const int64_t place = begin + tile * kTile + 4 * lane, at = row * a.size + place;
    const int64_t rest = a.size - place;
    const int n = rest < 0 ? 0 : rest < 4 ? static_cast<int>(rest) : 4;
    Real x[4], v[4], mean[4], reached[4];
    load4<kWide>(a.sample, a.sample_dtype, at, n, x);
    load4<kWide>(a.velocity, a.velocity_dtype, at, n, v);
#pragma unroll
    for (int c = 0; c < 4; ++c) mean[c] = cx * x[c] + cv * v[c];
    store4<kWide>(static_cast<Real*>(a.mean) + at, n, mean);
    if (a.previous != nullptr) {
      load4<kWide>(a.previous, a.previous_dtype, at, n, reached);
    } else {
#pragma unroll
      for (int c = 0; c < 4; ++c) reached[c] = mean[c] + deviation * own[4 * lane + c];
      if (count >> 32 != 0) reached[0] = reached[1] = reached[2] = reached[3] = Real(NAN);
      store_rounded<kWide>(a.next, a.sample_dtype, at, n, reached);
    }
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const Real d = reached[c] - mean[c];
      own[4 * lane + c] = c < n ? d * d : Real(0);
    }
    __syncwarp();
    Real sum = own[lane];
#pragma unroll
    for (int c = 1; c < 4; ++c) sum += own[lane + c * kLanes];
    squares[tile * kLanes + lane] = sum;
    __syncwarp();  // all have read before the next tile's noise comes
  }
#if !defined(RLIR_FAULT_BARRIER)
  __syncthreads();
#endif
  if (threadIdx.x >= kLanes) return;
  double sum = 0.0;
  for (int tile = 0; tile < in_chunk; ++tile) {
    sum += static_cast<double>(squares[tile * kLanes + lane]);
  }
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) {
    sum = sum + __shfl_xor_sync(0xffffu, sum, distance, kLanes);
  }
  if (lane == 0) a.partials[blockIdx.x] = sum;
}

// A warp a row: reads 32 chunks at a time and adds them one by one.
template <typename Real>
__global__ void __launch_bounds__(32) finish_kernel(FlowSdeStep a) {
  const int64_t row = blockIdx.x, chunks = flow_chunks(a.size);
  const int lane = threadIdx.x;
  double squares = 0.0;
  for (int64_t c = 0; c < chunks; c += 32) {
    const double own = c + lane < chunks ? a.partials[row * chunks + c + lane] : 0.0;
    for (int i = 0; i < 32; ++i) squares += __shfl_sync(0xffffffffu, own, i);
  }
  if (lane != 0) return;
  const FlowCoefficients k = coefficients(a.sigma, a.sigma_next, a.noise, row);
  static_cast<Real*>(a.logprob)[row] = static_cast<Real>(cpu::flow_logprob(k, squares, a.size));
  static_cast<Real*>(a.std)[row] = static_cast<Real>(k.std);
  RLIR_DEVICE_ASSERT(*a.offset >= 0 && *a.offset >> 32 == 0,
                     "flow_sde_step: offset must be >= 0 and below 2^32");
  RLIR_DEVICE_ASSERT(k.sample == k.sample,
                     "flow_sde_step: sigma must be above 0 and at most 1, and sigma_next >= 0 and "
                     "below sigma");
}

template <typename Real, bool kWide>
__global__ void __launch_bounds__(kThreads, 4) backward_kernel(FlowSdeBackward a) {
  RLIR_SHARED(Real, numbers, 2);
  const int64_t chunks = flow_chunks(a.size);
  const int64_t row = blockIdx.x / chunks, begin = (blockIdx.x - row * chunks) * kFlowChunk;
  if (threadIdx.x == 0) {
    const FlowCoefficients k = coefficients(a.sigma, a.sigma_next, a.noise, row);
    const double dlogprob = a.dlogprob.data == nullptr ? 0.0 : number(a.dlogprob, row);
    numbers[0] = static_cast<Real>(k.velocity);
    numbers[1] = static_cast<Real>(cpu::flow_slope(k, dlogprob, a.size));
  }
  __syncthreads();
  const Real cv = numbers[0], slope = numbers[1];
  const Dtype real = a.is_double ? Dtype::kFloat64 : Dtype::kFloat32;
  for (int64_t i = threadIdx.x * 4; i < kFlowChunk && begin + i < a.size; i += kThreads * 4) {
    const int64_t place = begin + i, at = row * a.size + place;
    const int n = static_cast<int>(min(static_cast<int64_t>(4), a.size - place));
    Real reached[4], mean[4], d[4] = {};
    load4<kWide>(a.reached, a.reached_dtype, at, n, reached);
    load4<kWide>(a.mean, real, at, n, mean);
    if (a.dmean != nullptr) load4<kWide>(a.dmean, real, at, n, d);
#pragma unroll
    for (int c = 0; c < 4; ++c) d[c] = cv * (d[c] + slope * (reached[c] - mean[c]));
    store4<kWide>(static_cast<Real*>(a.dvelocity) + at, n, d);
  }
}

// Whether four elements at a time can be read; null pointers say nothing against it.
template <typename... Pointers>
bool can_be_wide(int64_t size, Pointers... p) {
  return size % 4 == 0 && ((reinterpret_cast<uintptr_t>(p) % 16 == 0) && ...);
}

// Four elements at a time or one; as double or float.
template <typename Args>
int launch_either(void (*const (&kernels)[2][2])(Args), const Args& a, bool wide, int64_t blocks,
                  void* stream) {
  const auto kernel = kernels[a.is_double ? 1 : 0][wide ? 1 : 0];
  return launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0, stream, a);
}

}  // namespace

int flow_sde_step(const FlowSdeStep& a, void* stream) {
  const bool wide = can_be_wide(a.size, a.velocity, a.sample, a.previous, a.next, a.mean);
  void (*const kernels[2][2])(FlowSdeStep) = {
      {step_kernel<float, false>, step_kernel<float, true>},
      {step_kernel<double, false>, step_kernel<double, true>}};
  const int error = launch_either(kernels, a, wide, a.rows * flow_chunks(a.size), stream);
  if (error != 0) return error;
  const dim3 rows(static_cast<unsigned>(a.rows));
  return a.is_double ? launch(finish_kernel<double>, rows, dim3(32), 0, stream, a)
                     : launch(finish_kernel<float>, rows, dim3(32), 0, stream, a);
}

int flow_sde_backward(const FlowSdeBackward& a, void* stream) {
  const bool wide = can_be_wide(a.size, a.reached, a.mean, a.dmean, a.dvelocity);
  void (*const kernels[2][2])(FlowSdeBackward) = {
      {backward_kernel<float, false>, backward_kernel<float, true>},
      {backward_kernel<double, false>, backward_kernel<double, true>}};
  return launch_either(kernels, a, wide, a.rows * flow_chunks(a.size), stream);
}

}  // namespace rlir::cuda
