// Instructions that CUDA C++ has no name for, one function each: inline PTX on a GPU, the
// documented behaviour of each lane in the emulator. The emulator never sees the device branch; the
// PTX interpreter of the tests runs it. Layouts of fragments: PTX ISA, "Matrix fragments for
// mma.m16n8k16". Addresses of shared memory are 32 bit, from shared_address().
#pragma once

#include "cuda/portable.cuh"

namespace rlir::ptx {

#if defined(RLIR_EMU)

inline uint32_t shared_address(const void* p) { return emu::shared_address(p); }

inline void cp_async_16(uint32_t to, const void* from, uint32_t bytes = 16, RLIR_EMU_PLACE) {
  emu::cp_async(to, from, 16, bytes, file, line);
}
inline void cp_async_commit() { emu::cp_async_commit(); }
template <int kPending>
inline void cp_async_wait() {
  emu::cp_async_wait(kPending);
}

inline void ldmatrix_x4(uint32_t (&r)[4], uint32_t address, RLIR_EMU_PLACE) {
  emu::ldmatrix(r, 4, false, address, file, line);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t address, RLIR_EMU_PLACE) {
  emu::ldmatrix(r, 4, true, address, file, line);
}
inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                     RLIR_EMU_PLACE) {
  const uint32_t b[2] = {b0, b1};
  emu::mma_bf16(d, a, b, file, line);
}

// Results of .ftz.approx: subnormal inputs and outputs become zero.
inline float flushed(float x) { return fabsf(x) < 0x1p-126f ? copysignf(0.0f, x) : x; }
inline float ex2(float x) { return flushed(exp2f(flushed(x))); }
inline float lg2(float x) { return log2f(flushed(x)); }
inline float rcp(float x) { return flushed(1.0f / flushed(x)); }
inline float rsqrt(float x) { return 1.0f / sqrtf(flushed(x)); }

inline uint32_t bf16_bits(float x) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, x);
  if (x != x) return 0x7fffu;
  return (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
}
inline uint32_t pack_bf16(float low, float high) { return bf16_bits(low) | bf16_bits(high) << 16; }

#else

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// 16 bytes from global to shared memory, both aligned to 16; of these the first `bytes` are read
// and the rest is zero.
__device__ __forceinline__ void cp_async_16(uint32_t to, const void* from, uint32_t bytes = 16) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(to), "l"(from), "r"(bytes)
               : "memory");
}
// Closes a group of this thread's copies.
__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;\n" ::: "memory");
}
// Until at most kPending of this thread's latest groups are on their way. Other threads see the
// data only after a barrier.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

// Four 8 x 8 matrices of 16 bit elements; lane 8 m + i has the address of row i of matrix m.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
// d += a b: a 16 x 16, b 16 x 8, d 16 x 8, products of bf16 summed in float32.
__device__ __forceinline__ void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                         uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// 2^x, log2 x, 1 / x, 1 / sqrt x: approximate, about 22 bits.
__device__ __forceinline__ float ex2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float lg2(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float rcp(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float rsqrt(float x) {
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Two floats as bf16, rounded to nearest even; `low` in the low half.
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}

#endif

// The inverse of pack_bf16.
__device__ __forceinline__ float low_bf16(uint32_t x) { return __builtin_bit_cast(float, x << 16); }
__device__ __forceinline__ float high_bf16(uint32_t x) {
  return __builtin_bit_cast(float, x & 0xffff0000u);
}

}  // namespace rlir::ptx
