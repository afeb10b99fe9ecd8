// A probe: a small kernel with a C entry, called through ctypes in the emulator and run from its
// PTX by the interpreter. RLIR_PROBE(name) makes kernels name_sound and name_faulty of template
// <bool kFaulty> __device__ void name(const void* in, void* out, int n).
#pragma once

#include "cuda/ptx.cuh"

#define RLIR_PROBE_KERNEL(kernel, call)                                                        \
  extern "C" __global__ void __launch_bounds__(256) kernel(const void* in, void* out, int n) { \
    call(in, out, n);                                                                          \
  }
#define RLIR_PROBE(name)                       \
  RLIR_PROBE_KERNEL(name##_sound, name<false>) \
  RLIR_PROBE_KERNEL(name##_faulty, name<true>)

#if defined(RLIR_EMU)
namespace rlir::emu {
void add_buffer(const void* p, size_t bytes, const char* name, bool writable, bool written);
void forget_buffers();
}  // namespace rlir::emu

struct Probe {
  const char* name;
  void (*kernel)(const void*, void*, int);
};

// RLIR_PROBES(entry, {"name", kernel}...) defines int entry(name, grid, block, shared bytes, input,
// its bytes, output, its bytes, n), which returns 0 if nothing was found.
#define RLIR_PROBES(entry, ...)                                                                  \
  extern "C" __attribute__((visibility("default"))) int entry(                                   \
      const char* name, int grid, int block, int shared, const void* in, size_t in_bytes,        \
      void* out, size_t out_bytes, int n) {                                                      \
    static const Probe kProbes[] = {__VA_ARGS__};                                                \
    for (const Probe& probe : kProbes) {                                                         \
      if (strcmp(probe.name, name) != 0) continue;                                               \
      rlir::emu::add_buffer(in, in_bytes, "input", false, true);                                 \
      rlir::emu::add_buffer(out, out_bytes, "output", true, true);                               \
      const int code =                                                                           \
          rlir::emu::launch(probe.kernel, dim3(grid), dim3(block), shared, nullptr, in, out, n); \
      rlir::emu::forget_buffers();                                                               \
      return code;                                                                               \
    }                                                                                            \
    return -1;                                                                                   \
  }
#define RLIR_BOTH(name) \
  {#name "_sound", name##_sound}, { #name "_faulty", name##_faulty }
#else
#define RLIR_PROBES(entry, ...)
#endif
