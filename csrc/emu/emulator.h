// What CUDA offers to a kernel, for kernels compiled by the C++ compiler: types, built-in
// variables, barriers, warp collectives, atomics. One fiber runs each thread of a block, blocks run
// one after another. Needs no CUDA toolkit. For tests only; included through cuda/portable.cuh.
//
// No C++ standard library here: an instrumented kernel file would leave instrumented copies of its
// inline functions, and the runtime, which reports what instrumentation finds, could call them.
#pragma once

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "emu/types.h"

namespace rlir::emu {

// The thread that runs. Functions below that wait switch to another fiber.
struct Thread {
  uint3 thread, block;
  int lane;
  int linear;  // of the block's threads
};
extern Thread* current;
extern dim3 block_size, grid_size;

// Where in the source a collective was called, filled in by the compiler.
#define RLIR_EMU_PLACE const char *file = __builtin_FILE(), int line = __builtin_LINE()
// For what runs on behalf of a kernel but is not its memory access.
#define RLIR_EMU_UNCHECKED \
  __attribute__((no_sanitize("thread"), no_sanitize("undefined"), noinline))

[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));
void device_assertion(const char* text);
void barrier(int id, int threads, const char* file, int line);
void sync_warp(uint32_t mask, const char* file, int line);
void yield();

// A warp collective: the last lane of `mask` to arrive computes for all. `arguments` has one entry
// per lane, null for those not in the mask.
using Collective = void (*)(void** arguments, uint32_t mask);
void collective(void* argument, uint32_t mask, Collective compute, const char* what,
                const char* file, int line);

void* static_shared(const void* key, size_t bytes, size_t alignment);
void* dynamic_shared();
uint32_t shared_address(const void* p);
void cp_async(uint32_t to, const void* from, uint32_t size, uint32_t bytes, const char* file,
              int line);
void cp_async_commit();
void cp_async_wait(int pending);
void ldmatrix(uint32_t* r, int matrices, bool transposed, uint32_t address, const char* file,
              int line);
void mma_bf16(float* d, const uint32_t* a, const uint32_t* b, const char* file, int line);

// Tells the detector of an atomic access.
void touch_atomic(const void* p, size_t bytes, const void* pc);

using Body = void (*)(const void* parameters);
// Runs the body once per thread. `parameters` is the block of kernel parameters. Returns 0, or 1
// with last_error() set.
int run(dim3 grid, dim3 block, size_t shared_bytes, Body body, const void* parameters,
        size_t parameter_bytes);

template <typename... Parameters, typename... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, void*,
           Arguments... arguments) {
  const auto call = [=] { kernel(Parameters(arguments)...); };
  using Call = decltype(call);
  return run(
      grid, block, shared_bytes, [](const void* c) { (*static_cast<Call*>(c))(); }, &call,
      sizeof call);
}

}  // namespace rlir::emu

#define threadIdx (::rlir::emu::current->thread)
#define blockIdx (::rlir::emu::current->block)
#define blockDim (::rlir::emu::block_size)
#define gridDim (::rlir::emu::grid_size)
constexpr int warpSize = 32;

inline void __syncthreads(RLIR_EMU_PLACE) { ::rlir::emu::barrier(0, 0, file, line); }
inline void __syncwarp(uint32_t mask = 0xffffffffu, RLIR_EMU_PLACE) {
  ::rlir::emu::sync_warp(mask, file, line);
}
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __nanosleep(unsigned) { ::rlir::emu::yield(); }
inline void __trap() { ::rlir::emu::fail("__trap()"); }

#include "emu/intrinsics.h"
