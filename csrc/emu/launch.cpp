// A launch: stacks and shared memory for the threads of a block, the blocks one after another, and
// the C functions that tests call.
#include <sys/mman.h>

#include <cstdlib>

#include "emu/runtime.h"

namespace rlir::emu {

Thread* current;
dim3 block_size, grid_size;
Options options;
Block block;
std::vector<Fiber> fibers;
uint8_t *stacks, *stacks_end, *arena, *arena_end;
const void* parameters;
size_t parameter_bytes;
uint32_t epoch = 1, first_epoch_of_launch;

Body body;

namespace {

std::string error;
uint64_t random_state = 1;

void prepare_fiber(Fiber& fiber, size_t i) {
  // Tops differ in their low bits: equally aligned stacks would collide in the caches.
  uint8_t* top = stacks + (i + 1) * kStackBytes - 256 - (i % 61) * 192;
  void** stack = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(top) & ~uintptr_t{63});
  *--stack = nullptr;  // where fiber_main would return to; keeps the stack aligned
  *--stack = reinterpret_cast<void*>(fiber_main);
  for (int i = 0; i < 6; ++i) *--stack = nullptr;
  fiber.stack_pointer = stack;
}

void allocate(size_t threads) {
  constexpr int kFlags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  if (arena == nullptr) {
    void* p = mmap(nullptr, kArenaBytes, PROT_READ | PROT_WRITE, kFlags, -1, 0);
    if (p == MAP_FAILED) abort();
    arena = static_cast<uint8_t*>(p);
    arena_end = arena + kArenaBytes;
  }
  const size_t have = static_cast<size_t>(stacks_end - stacks) / kStackBytes;
  if (have >= threads) return;
  if (stacks != nullptr) munmap(stacks, have * kStackBytes);
  void* p = mmap(nullptr, threads * kStackBytes, PROT_READ | PROT_WRITE, kFlags, -1, 0);
  if (p == MAP_FAILED) abort();
  stacks = static_cast<uint8_t*>(p);
  stacks_end = stacks + threads * kStackBytes;
  for (size_t i = 0; i < threads; ++i) mprotect(stacks + i * kStackBytes, 4096, PROT_NONE);
}

void prepare_block(uint32_t linear, dim3 grid, dim3 size, size_t dynamic_bytes) {
  const size_t threads = fibers.size();
  forget_ready();
  block.shared = arena;
  block.static_bytes = 0;
  // A launch may ask for 16 byte aligned memory only, but its start is aligned further.
  block.dynamic = arena_end - (dynamic_bytes + 1023) / 1024 * 1024;
  block.dynamic_bytes = dynamic_bytes;
  block.alive = block.threads = static_cast<int>(threads);
  block.linear = linear;
  block.epoch = ++epoch;
  block.statics.clear();
  for (auto& waiting : block.waiting) waiting.clear();
  block.warps.resize((threads + 31) / 32);
  for (Warp& warp : block.warps) warp.waiting = warp.lanes = 0;
  memset(arena, 0xff, kMostStatic);  // NaN in every floating-point format
  memset(block.dynamic, 0xff, arena_end - block.dynamic);
  begin_block();
  for (size_t i = 0; i < threads; ++i) {
    Fiber& fiber = fibers[i];
    const unsigned t = static_cast<unsigned>(i);
    fiber.thread = {t % size.x, t / size.x % size.y, t / size.x / size.y};
    fiber.block = {linear % grid.x, linear / grid.x % grid.y, linear / grid.x / grid.y};
    fiber.linear = static_cast<int>(i);
    fiber.lane = static_cast<int>(i % 32);
    fiber.warp = &block.warps[i / 32];
    fiber.warp->lanes |= 1u << fiber.lane;
    fiber.warp->fiber[fiber.lane] = &fiber;
    fiber.what = fiber.file = "";
    fiber.committed = 0;
    fiber.copies.clear();
    prepare_fiber(fiber, i);
    make_ready(&fiber);
  }
}

}  // namespace

uint64_t random_number() {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return random_state;
}

int run(dim3 grid, dim3 size, size_t dynamic_bytes, Body kernel, const void* kernel_parameters,
        size_t bytes) {
  error.clear();
  const size_t threads = size_t{size.x} * size.y * size.z;
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  if (threads == 0 || threads > 1024 || size.z > 64 || blocks == 0 || grid.x > 0x7fffffffu ||
      grid.y > 65535 || grid.z > 65535 || dynamic_bytes > kMostShared || blocks > 0xffffffffu) {
    error = "invalid launch configuration";
    return 1;
  }
  body = kernel;
  parameters = kernel_parameters;
  parameter_bytes = bytes;
  block_size = size;
  grid_size = grid;
  take_findings();  // of nothing
  random_state = 88172645463325252ull ^ (options.seed * 0x9e3779b97f4a7c15ull);
  if (random_state == 0) random_state = 1;
  allocate(threads);
  fibers.assign(threads, Fiber{});
  first_epoch_of_launch = ++epoch;
  clear_profile();
  begin_launch();

  std::vector<uint32_t> order(blocks);
  for (uint32_t i = 0; i < blocks; ++i) order[i] = i;
  if (options.order == 1) {
    for (uint32_t i = 0; i < blocks; ++i) order[i] = static_cast<uint32_t>(blocks) - 1 - i;
  } else if (options.order == 2) {
    for (uint32_t i = static_cast<uint32_t>(blocks); i > 1; --i) {
      std::swap(order[i - 1], order[random_number() % i]);
    }
  }
  for (const uint32_t linear : order) {
    prepare_block(linear, grid, size, dynamic_bytes);
    error = run_block();
    if (!error.empty()) break;
  }
  const std::string findings = take_findings();
  if (!error.empty() && !findings.empty()) error += "; ";
  error += findings;
  return error.empty() ? 0 : 1;
}

}  // namespace rlir::emu

namespace rlir::cuda {
const char* error_text(int code) { return code == 0 ? "success" : ::rlir::emu::error.c_str(); }
}  // namespace rlir::cuda

extern "C" __attribute__((visibility("default"))) void rlir_emu_configure(int order, uint64_t seed,
                                                                          int late_copies,
                                                                          int profile_block) {
  using rlir::emu::options;
  options.order = order;
  options.seed = seed;
  options.late_copies = late_copies != 0;
  options.profile_block = profile_block;
}
extern "C" __attribute__((visibility("default"))) const char* rlir_emu_error() {
  return rlir::emu::error.c_str();
}
extern "C" __attribute__((visibility("default"))) const char* rlir_emu_profile() {
  return rlir::emu::profile_text();
}
extern "C" __attribute__((visibility("default"))) int rlir_emu_instrumented() {
  return rlir::emu::instrumented() ? 1 : 0;
}
