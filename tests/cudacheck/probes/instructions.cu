// Every function of ptx.cuh, and the arithmetic, control flow and warp functions that kernels are
// made of, for comparing the emulator with the PTX that nvcc makes of the same source. No branch of
// the emulator is involved in the latter.
#include "probe.cuh"

namespace ptx = rlir::ptx;

// --- Tensor cores: a b^T and a v for 16 x 16 matrices of bf16, by one warp
// -------------------------

template <bool kFaulty>
__device__ __forceinline__ void product(const void* in, void* out, int) {
  RLIR_SHARED(uint4, tile, 96);  // a, b, v: rows of two 16 byte chunks
  const int lane = static_cast<int>(threadIdx.x), m = lane / 8;
  const uint4* x = static_cast<const uint4*>(in);
  for (int i = lane; i < 96; i += 32) ptx::cp_async_16(ptx::shared_address(tile + i), x + i);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  __syncthreads();
  const auto chunk = [&](int matrix, int row, int column) {
    return ptx::shared_address(tile + matrix * 32 + row * 2 + column);
  };
  uint32_t a[4], b[4], v[4];
  ptx::ldmatrix_x4(a, chunk(0, lane % 16, lane / 16));
  // Matrices 0 and 1 are columns 0 to 7 and 8 to 15 of the first 8 rows of b.
  const int row = kFaulty ? m % 2 : m / 2, column = kFaulty ? m / 2 : m % 2;
  ptx::ldmatrix_x4(b, chunk(1, row * 8 + lane % 8, column));
  ptx::ldmatrix_x4_trans(v, chunk(2, m % 2 * 8 + lane % 8, m / 2));
  float* y = static_cast<float*>(out);
  for (int half = 0; half < 2; ++half) {
    float ab[4] = {}, av[4] = {};
    ptx::mma_bf16(ab, a, b[2 * half], b[2 * half + 1]);
    ptx::mma_bf16(av, a, v[2 * half], v[2 * half + 1]);
    for (int i = 0; i < 4; ++i) {
      const int at = (lane / 4 + i / 2 * 8) * 16 + half * 8 + lane % 4 * 2 + i % 2;
      y[at] = ab[i];
      y[256 + at] = av[i];
    }
  }
}
RLIR_PROBE(product)

// --- Copies with a zeroed tail, in two groups
// ------------------------------------------------------

template <bool kFaulty>
__device__ __forceinline__ void copies(const void* in, void* out, int n) {
  RLIR_SHARED(uint4, tile, 64);
  const char* from = static_cast<const char*>(in);
  for (int group = 0; group < 2; ++group) {
    const int at = (group * 32 + static_cast<int>(threadIdx.x)) * 16;
    const int bytes = max(0, min(16, n - at));
    ptx::cp_async_16(ptx::shared_address(tile) + at, from + (bytes > 0 ? at : 0), bytes);
    ptx::cp_async_commit();
  }
  uint4* y = static_cast<uint4*>(out);
  ptx::cp_async_wait<1>();
  __syncwarp();
  y[threadIdx.x] = tile[31 - threadIdx.x];
  ptx::cp_async_wait<0>();
  __syncwarp();
  y[32 + threadIdx.x] = tile[63 - threadIdx.x];
}
RLIR_PROBE(copies)

// --- Approximate functions and bf16, 8 results a thread
// --------------------------------------------

__device__ __forceinline__ void approximations(const void* in, void* out, int) {
  const float x = static_cast<const float*>(in)[threadIdx.x];
  uint32_t* y = static_cast<uint32_t*>(out) + threadIdx.x * 8;
  y[0] = __float_as_uint(ptx::ex2(x));
  y[1] = __float_as_uint(ptx::lg2(fabsf(x)));
  y[2] = __float_as_uint(ptx::rcp(x));
  y[3] = __float_as_uint(ptx::rsqrt(fabsf(x)));
  y[4] = ptx::pack_bf16(x, 2.0f * x + 1.0f);
  y[5] = __float_as_uint(ptx::low_bf16(y[4]) - ptx::high_bf16(y[4]));
  y[6] = __float_as_uint(expf(x));
  y[7] = __float_as_uint(logf(fabsf(x)));
}
RLIR_PROBE_KERNEL(approximations_sound, approximations)

// --- Integers, 16 results a thread
// -----------------------------------------------------------------

__device__ __forceinline__ void integers(const void* in, void* out, int n) {
  const uint32_t* x = static_cast<const uint32_t*>(in);
  const uint32_t a = x[2 * threadIdx.x], b = x[2 * threadIdx.x + 1];
  const int s = static_cast<int>(a), t = static_cast<int>(b) | 1;
  uint32_t* y = static_cast<uint32_t*>(out) + threadIdx.x * 16;
  y[0] = a + b * 3u - n;
  y[1] = (a & b) ^ (~a | (b << 5)) ^ (a >> (b % 32u));
  y[2] = static_cast<uint32_t>(s / t);
  y[3] = static_cast<uint32_t>(s % t);
  y[4] = a / (b | 1u) + a % (b | 3u);
  y[5] = __umulhi(a, b) ^ a * b;
  y[6] = static_cast<uint32_t>(__popc(a) + 100 * __clz(s) + 10000 * __ffs(s));
  y[7] = __brev(a);
  y[8] = static_cast<uint32_t>(min(s, t) ^ max(s, t)) ^ min(a, b) ^ max(a, b);
  const uint64_t wide = static_cast<uint64_t>(a) * b + (static_cast<uint64_t>(b) << 17);
  y[9] = static_cast<uint32_t>(wide >> 32) ^ static_cast<uint32_t>(wide % 1000003u);
  const int64_t low = static_cast<int64_t>(s) * t;
  y[10] = static_cast<uint32_t>(low >> 13) ^ static_cast<uint32_t>(low / 77);
  y[11] = static_cast<uint32_t>(s >> 7) + (s < t ? 1u : 0u) + (a < b ? 2u : 0u);
  y[12] = (a >> 8 & 0xffu) | (b & 0xff00u) << 8 | (a & 0xffu) << 8 | b >> 24 << 24;
  y[13] = static_cast<uint32_t>(static_cast<int8_t>(a)) + static_cast<uint16_t>(b);
  uint32_t c[4] = {a, b, a ^ 0xD2511F53u, b ^ 0xCD9E8D57u};  // rounds of Philox 4x32
  for (int round = 0; round < 3; ++round) {
    const uint32_t high0 = __umulhi(0xD2511F53u, c[0]), low0 = 0xD2511F53u * c[0];
    const uint32_t high1 = __umulhi(0xCD9E8D57u, c[2]), low1 = 0xCD9E8D57u * c[2];
    c[0] = high1 ^ c[1] ^ a;
    c[1] = low1;
    c[2] = high0 ^ c[3] ^ b;
    c[3] = low0;
  }
  y[14] = c[0] ^ c[1];
  y[15] = c[2] ^ c[3];
}
RLIR_PROBE_KERNEL(integers_sound, integers)

// --- Floats and doubles, 16 results of 8 bytes a thread
// --------------------------------------------

__device__ __forceinline__ void floats(const void* in, void* out, int n) {
  const float* x = static_cast<const float*>(in);
  const float a = x[2 * threadIdx.x], b = x[2 * threadIdx.x + 1];
  double* y = static_cast<double*>(out) + threadIdx.x * 16;
  y[0] = __fadd_rn(__fmul_rn(a, b), a);
  y[1] = fmaf(a, b, a);
  y[2] = a / b;
  y[3] = sqrtf(fabsf(a));
  y[4] = fmaxf(a, b) - fminf(a, 0.5f);
  y[5] = static_cast<int>(a * 3.0f) + static_cast<int>(rintf(b)) + floorf(a) + ceilf(b);
  y[6] = static_cast<float>(static_cast<int>(threadIdx.x) - n) + static_cast<unsigned>(fabsf(a));
  const double p = a, q = b;
  y[7] = __dadd_rn(__dmul_rn(p, q), p);
  y[8] = fma(p, q, p);
  y[9] = p / q;
  y[10] = sqrt(fabs(p));
  y[11] = fmin(p, q) + fmax(p, -q);
  y[12] = static_cast<double>(static_cast<int64_t>(p * 1e6)) + static_cast<float>(q * 1e-3);
  y[13] = a < b ? p : a == b ? 1.0 : q != q ? 2.0 : -q;
  y[14] = isnan(a / (a - a)) ? 1.0 : copysign(p, q);
  y[15] = __int_as_float(__float_as_int(a) ^ 0x00400000) + trunc(q);
}
RLIR_PROBE_KERNEL(floats_sound, floats)

// --- Warp functions, 16 results a thread; warps of half size too
// -----------------------------------

__device__ __forceinline__ void warps(const void* in, void* out, int) {
  const uint32_t x = static_cast<const uint32_t*>(in)[threadIdx.x];
  const int lane = static_cast<int>(threadIdx.x % 32);
  const uint32_t all = 0xffffffffu;
  uint32_t* y = static_cast<uint32_t*>(out) + threadIdx.x * 16;
  y[0] = __shfl_sync(all, x, lane * 7 + 3);
  y[1] = __shfl_up_sync(all, x, 3);
  y[2] = __shfl_down_sync(all, x, 5);
  y[3] = __shfl_xor_sync(all, x, 9);
  y[4] = __shfl_sync(all, x, 5, 8);
  y[5] = __shfl_down_sync(all, x, 3, 16);
  y[6] = __ballot_sync(all, x % 3 == 0);
  y[7] = static_cast<uint32_t>(__any_sync(all, x == 12345u) + 2 * __all_sync(all, x != 54321u));
  y[8] = lane < 16 ? __shfl_xor_sync(0xffffu, x, 4, 16) : __shfl_xor_sync(0xffff0000u, x, 8, 16);
  y[9] = __match_any_sync(all, x % 5);
  y[10] = __reduce_add_sync(all, x) ^ __reduce_max_sync(all, x);
  y[11] = __reduce_min_sync(all, x) ^ __reduce_or_sync(all, x & 0xff00u);
  const double wide = __shfl_xor_sync(all, static_cast<double>(x), 16);
  y[12] = static_cast<uint32_t>(wide * 0.5);
  uint32_t sum = x;
  for (int o = 1; o < 32; o *= 2) {  // lanes diverge in each step
    const uint32_t other = __shfl_up_sync(all, sum, o);
    if (lane >= o) sum += other;
  }
  y[13] = sum;
  y[14] = y[15] = 0;
}
RLIR_PROBE_KERNEL(warps_sound, warps)

// --- Control flow, local arrays, calls, atomics, shared memory of every width
// ----------------------

__device__ __attribute__((noinline)) uint32_t collatz(uint32_t x) {
  uint32_t steps = 0;
  while (x > 1 && steps < 200) {
    x = x % 2 == 0 ? x / 2 : 3 * x + 1;
    ++steps;
  }
  return steps;
}

__device__ __forceinline__ void control(const void* in, void* out, int n) {
  RLIR_SHARED(uint32_t, counts, 16);
  RLIR_SHARED(uint8_t, bytes, 64);
  RLIR_SHARED(uint16_t, halves, 64);
  RLIR_SHARED(double, wide, 64);
  const unsigned t = threadIdx.x;
  const uint32_t x = static_cast<const uint32_t*>(in)[t];
  if (t < 16) counts[t] = 0;
  bytes[t] = static_cast<uint8_t>(x);
  halves[t] = static_cast<uint16_t>(x >> 3);
  wide[t] = x * 0.25;
  __syncthreads();
  atomicAdd(counts + x % 8, 1u);
  atomicMax(counts + 8, x);
  atomicMin(counts + 9, x % 7);
  atomicOr(counts + 10, 1u << t % 32);
  const uint32_t old = atomicCAS(counts + 11, 0u, 7u);
  uint32_t local[8];
  for (unsigned i = 0; i < 8; ++i) local[i] = x + i * i;
  local[x % 8] += 1000;
  uint32_t sum = collatz(x % 1000 + 1);
  for (unsigned i = 0; i < x % 11; ++i) {
    if (i == 7) break;
    if (local[i % 8] % 2 == 0) continue;
    sum += local[(i + t) % 8];
  }
  switch (x % 6) {
    case 0:
      sum += 1;
      break;
    case 1:
      sum ^= 0x55;
      break;
    case 2:
      sum *= 3;
      break;
    case 3:
      sum -= n;
      break;
    default:
      sum = ~sum;
  }
  __syncthreads();
  uint32_t* y = static_cast<uint32_t*>(out) + t * 4;
  y[0] = sum;
  y[1] = counts[t % 11];
  y[2] = bytes[63 - t] + halves[t ^ 5] * 3u + (old == 0 || old == 7 ? 1u : 0u);
  y[3] = static_cast<uint32_t>(wide[63 - t] * 4.0);
  atomicAdd(static_cast<float*>(out) + 256, static_cast<float>(x % 16));
}
RLIR_PROBE_KERNEL(control_sound, control)

#if defined(RLIR_EMU)
RLIR_PROBES(rlir_probe, RLIR_BOTH(product), RLIR_BOTH(copies),
            {"approximations_sound", approximations_sound}, {"integers_sound", integers_sound},
            {"floats_sound", floats_sound}, {"warps_sound", warps_sound},
            {"control_sound", control_sound})
#endif
