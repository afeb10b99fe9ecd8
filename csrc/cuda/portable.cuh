// What every kernel file includes first. One source is compiled by nvcc for GPUs and by the C++
// compiler for the emulator (csrc/emu), which runs it on the CPU and checks it. Where the two need
// different words, this file has one name for both:
//
//   RLIR_SHARED(T, name, n)         T name[n] in shared memory
//   RLIR_SHARED_DYNAMIC(T, name)    T* name, the shared memory that the launch asked for
//   launch(kernel, grid, block, shared_bytes, stream, arguments...) -> error code, 0 is success
//   RLIR_DEVICE_ASSERT(condition, "what must hold")
//   const RLIR_GRID_CONSTANT T a    a large parameter of a kernel that is read in place
//
// Raw __shared__ and <<<>>> do not compile in the emulator, so that they cannot slip through.
// A kernel's body may depend on __CUDA_ARCH__, its declaration may not.
#pragma once

#include <stddef.h>
#include <stdint.h>

#if defined(RLIR_EMU)

#include "emu/emulator.h"

namespace rlir::cuda {
using emu::launch;
}  // namespace rlir::cuda

#define RLIR_SHARED(T, name, n)             \
  static const char rlir_shared_##name = 0; \
  T* const name = static_cast<T*>(          \
      ::rlir::emu::static_shared(&rlir_shared_##name, sizeof(T) * (n), alignof(T)))
#define RLIR_SHARED_DYNAMIC(T, name) T* const name = static_cast<T*>(::rlir::emu::dynamic_shared())
#define RLIR_GRID_CONSTANT
#define RLIR_DEVICE_ASSERT(condition, text)                \
  do {                                                     \
    if (!(condition)) ::rlir::emu::device_assertion(text); \
  } while (false)

#else

#include <assert.h>
#include <cuda_runtime.h>

#define RLIR_SHARED(T, name, n) __shared__ T name[n]
#define RLIR_GRID_CONSTANT __grid_constant__
#define RLIR_SHARED_DYNAMIC(T, name)                                    \
  extern __shared__ __align__(128) unsigned char rlir_shared_dynamic[]; \
  T* const name = reinterpret_cast<T*>(rlir_shared_dynamic)
// Not assert(): NDEBUG would take it away, and it would put the file's path into the binary.
// Like PyTorch's own checks of indices, it shows as a CUDA error at the next synchronisation.
#define RLIR_DEVICE_ASSERT(condition, text)                               \
  do {                                                                    \
    if (!(condition)) __assert_fail(text, "rlir", 0, "device assertion"); \
  } while (false)

namespace rlir::cuda {

template <typename... Parameters, typename... Arguments>
inline int launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                  void* stream, Arguments... arguments) {
  if (shared_bytes > 48 * 1024) {
    const cudaError_t error = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return error;
  }
  // clang-format off
  kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(
      Parameters(arguments)...);
  // clang-format on
  return cudaGetLastError();
}

}  // namespace rlir::cuda

#endif

namespace rlir::cuda {

// Text of an error code of launch().
const char* error_text(int code);

template <typename T>
inline T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}

}  // namespace rlir::cuda
