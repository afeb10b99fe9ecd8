// CUDA's keywords and vector types for the C++ compiler.
#pragma once

#include <stddef.h>
#include <stdint.h>

#if defined(__CUDACC__)
#error "emu/types.h is for the C++ compiler: nvcc has these itself"
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
// It would silently become a local variable.
#define __shared__ static_assert(false, "RLIR_SHARED or RLIR_SHARED_DYNAMIC instead of __shared__")

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

#define RLIR_EMU_VECTORS(T, name)                            \
  struct alignas(2 * sizeof(T)) name##2 { T x, y; };         \
  struct alignas(16) name##4 { T x, y, z, w; };              \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; } \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
RLIR_EMU_VECTORS(float, float)
RLIR_EMU_VECTORS(int, int)
RLIR_EMU_VECTORS(unsigned, uint)
#undef RLIR_EMU_VECTORS
struct alignas(16) double2 {
  double x, y;
};
inline double2 make_double2(double x, double y) { return {x, y}; }
struct alignas(8) ushort4 {
  unsigned short x, y, z, w;
};
struct alignas(16) longlong2 {
  long long x, y;
};
