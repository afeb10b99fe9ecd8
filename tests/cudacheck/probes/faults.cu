// Small kernels that are right, and the same with one typical bug each. The checks must pass the
// former and catch the latter.
#include "probe.cuh"

namespace ptx = rlir::ptx;

// --- A barrier is missing: block sums through shared memory
// ----------------------------------------

template <bool kFaulty>
__device__ __forceinline__ void missing_barrier(const void* in, void* out, int n) {
  RLIR_SHARED(float, partial, 8);
  const float* x = static_cast<const float*>(in) + blockIdx.x * n;
  float sum = 0.0f;
  for (int i = threadIdx.x; i < n; i += blockDim.x) sum += x[i];
  for (int o = 16; o > 0; o /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, o);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
  if (!kFaulty) __syncthreads();
  if (threadIdx.x == 0) {
    sum = 0.0f;
    for (unsigned i = 0; i < blockDim.x / 32; ++i) sum += partial[i];
    static_cast<float*>(out)[blockIdx.x] = sum;
  }
}
RLIR_PROBE(missing_barrier)

// --- cp.async is waited for too late: a double-buffered sum of tiles of 32 x 16 bytes
// --------------

template <bool kFaulty>
__device__ __forceinline__ void wrong_wait(const void* in, void* out, int n) {
  RLIR_SHARED(uint4, tile, 64);
  const uint4* x = static_cast<const uint4*>(in);
  const auto fetch = [&](int t) {
    ptx::cp_async_16(ptx::shared_address(tile + t % 2 * 32 + threadIdx.x),
                     x + t * 32 + threadIdx.x);
  };
  fetch(0);
  ptx::cp_async_commit();
  uint32_t sum = 0;
  for (int t = 0; t < n; ++t) {
    if (t + 1 < n) fetch(t + 1);
    ptx::cp_async_commit();
    ptx::cp_async_wait<kFaulty ? 2 : 1>();
    __syncthreads();
    const uint4 v = tile[t % 2 * 32 + (threadIdx.x ^ 1)];
    sum += v.x + v.y + v.z + v.w;
    __syncthreads();
  }
  ptx::cp_async_wait<0>();
  static_cast<uint32_t*>(out)[threadIdx.x] = sum;
}
RLIR_PROBE(wrong_wait)

// --- The tail is off by one
// ------------------------------------------------------------------------

template <bool kFaulty>
__device__ __forceinline__ void wrong_tail(const void* in, void* out, int n) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (kFaulty ? i <= n : i < n) {
    static_cast<float*>(out)[i] = 2.0f * static_cast<const float*>(in)[i];
  }
}
RLIR_PROBE(wrong_tail)

// --- Lanes exchange through shared memory without __syncwarp
// ---------------------------------------

template <bool kFaulty>
__device__ __forceinline__ void missing_warp_sync(const void* in, void* out, int) {
  RLIR_SHARED(float, row, 256);
  const unsigned t = threadIdx.x;
  row[t] = static_cast<const float*>(in)[t];
  if (!kFaulty) __syncwarp();
  static_cast<float*>(out)[t] = row[t ^ 31];
}
RLIR_PROBE(missing_warp_sync)

// --- Blocks add to one place without an atomic
// -----------------------------------------------------

template <bool kFaulty>
__device__ __forceinline__ void plain_add(const void* in, void* out, int n) {
  float* sum = static_cast<float*>(out) + threadIdx.x;
  const float x = static_cast<const float*>(in)[blockIdx.x * n + threadIdx.x];
  if (kFaulty) {
    *sum += x;
  } else {
    atomicAdd(sum, x);
  }
}
RLIR_PROBE(plain_add)

// --- The mask of a shuffle names lanes that do not come
// --------------------------------------------

template <bool kFaulty>
__device__ __forceinline__ void wrong_mask(const void* in, void* out, int) {
  float x = static_cast<const float*>(in)[threadIdx.x];
  if (threadIdx.x < 16) {
    for (int o = 8; o > 0; o /= 2) {
      x += __shfl_xor_sync(kFaulty ? 0xffffffffu : 0xffffu, x, o, 16);
    }
  }
  static_cast<float*>(out)[threadIdx.x] = x;
}
RLIR_PROBE(wrong_mask)

// --- Some threads of a block never come to a barrier
// -----------------------------------------------

template <bool kFaulty>
__device__ __forceinline__ void divergent_barrier(const void* in, void* out, int n) {
  RLIR_SHARED(float, row, 256);
  const int t = static_cast<int>(threadIdx.x);
  if (kFaulty && t >= n) return;
  row[t] = t < n ? static_cast<const float*>(in)[t] : 0.0f;
  __syncthreads();
  if (t < n) static_cast<float*>(out)[t] = row[(t + 1) % n];
}
RLIR_PROBE(divergent_barrier)

// --- Shared memory is read before it is written
// ----------------------------------------------------

template <bool kFaulty>
__device__ __forceinline__ void never_written(const void* in, void* out, int n) {
  RLIR_SHARED(float, row, 64);
  const int t = static_cast<int>(threadIdx.x);
  if (t < (kFaulty ? n : 64)) row[t] = t < n ? static_cast<const float*>(in)[t] : 0.0f;
  __syncthreads();
  const float x = row[63 - t];
  static_cast<float*>(out)[t] = x < 1e30f ? x : 0.0f;
}
RLIR_PROBE(never_written)

// --- More shared memory is used than the launch asked for
// ------------------------------------------

template <bool kFaulty>
__device__ __forceinline__ void beyond_shared(const void* in, void* out, int n) {
  RLIR_SHARED_DYNAMIC(float, row);
  const int t = static_cast<int>(threadIdx.x);
  if (kFaulty || t < n) row[t] = static_cast<const float*>(in)[t];
  __syncthreads();
  if (t < n) static_cast<float*>(out)[t] = row[n - 1 - t];
}
RLIR_PROBE(beyond_shared)

// --- A vector is loaded from where it is not aligned
// -----------------------------------------------

template <bool kFaulty>
__device__ __forceinline__ void unaligned(const void* in, void* out, int) {
  const float* x = static_cast<const float*>(in) + threadIdx.x * 4 + (kFaulty ? 1 : 0);
  const float4 v = *reinterpret_cast<const float4*>(x);
  static_cast<float*>(out)[threadIdx.x] = v.x + v.y + v.z + v.w;
}
RLIR_PROBE(unaligned)

// --- An input is written
// ---------------------------------------------------------------------------

template <bool kFaulty>
__device__ __forceinline__ void writes_input(const void* in, void* out, int) {
  float* x = static_cast<float*>(const_cast<void*>(in)) + threadIdx.x;
  static_cast<float*>(out)[threadIdx.x] = *x;
  if (kFaulty) *x = 0.0f;
}
RLIR_PROBE(writes_input)

// --- A block reads what another block of the launch wrote
// ------------------------------------------

template <bool kFaulty>
__device__ __forceinline__ void reads_other_block(const void* in, void* out, int n) {
  float* y = static_cast<float*>(out);
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  y[i] = static_cast<const float*>(in)[i];
  __syncthreads();
  if (threadIdx.x == 0) y[n + blockIdx.x] = y[kFaulty ? 0 : blockIdx.x * blockDim.x];
}
RLIR_PROBE(reads_other_block)

// --- A column of a tile is read: 32 lanes in one bank, unless rows are padded
// ----------------------

template <bool kFaulty>
__device__ __forceinline__ void bank_conflict(const void* in, void* out, int) {
  constexpr int kRow = kFaulty ? 32 : 33;
  RLIR_SHARED(float, tile, 32 * kRow);
  const unsigned lane = threadIdx.x;
  for (unsigned i = 0; i < 32; ++i) {
    tile[i * kRow + lane] = static_cast<const float*>(in)[i * 32 + lane];
  }
  __syncthreads();
  for (unsigned i = 0; i < 32; ++i) static_cast<float*>(out)[i * 32 + lane] = tile[lane * kRow + i];
}
RLIR_PROBE(bank_conflict)

#if defined(RLIR_EMU)
RLIR_PROBES(rlir_probe, RLIR_BOTH(missing_barrier), RLIR_BOTH(wrong_wait), RLIR_BOTH(wrong_tail),
            RLIR_BOTH(missing_warp_sync), RLIR_BOTH(plain_add), RLIR_BOTH(wrong_mask),
            RLIR_BOTH(divergent_barrier), RLIR_BOTH(never_written), RLIR_BOTH(beyond_shared),
            RLIR_BOTH(unaligned), RLIR_BOTH(writes_input), RLIR_BOTH(reads_other_block),
            RLIR_BOTH(bank_conflict))
#endif
