// Inside of the emulator: fibers, the running block, and what the parts say to each other.
// These files are never instrumented.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "emu/emulator.h"

namespace rlir::emu {

enum class State { kReady, kRunning, kBarrier, kCollective, kDone };

// A copy that cp.async started. It lands when the thread waits for it: the latest legal moment.
struct Copy {
  uint8_t* to;
  const void* from;
  uint32_t size, bytes;  // bytes: what is read, the rest becomes zero
  int group;             // -1: not committed
  const char* file;
  int line;
  const void* pc;
};

struct Warp;
struct Fiber : Thread {
  Warp* warp;
  void* stack_pointer;
  State state;
  uint32_t mask;
  void* argument;
  Collective compute;
  const char* what;
  const char* file;
  int line;
  int committed;
  std::vector<Copy> copies;
};

struct Warp {
  uint32_t waiting = 0, lanes = 0;  // who waits in a collective; who exists
  Fiber* fiber[32] = {};
  uint32_t time = 0;             // counts __syncwarp()s
  uint32_t synced[32][32] = {};  // the time at which two lanes last met in one
};

struct Block {
  uint8_t* shared;  // static shared memory from here on
  size_t static_bytes;
  uint8_t* dynamic;  // ends at the end of the arena
  size_t dynamic_bytes;
  int alive, threads;
  uint32_t linear;
  uint32_t epoch;  // counts barriers, over all blocks
  std::vector<Fiber*> waiting[16];
  std::vector<Warp> warps;
  std::vector<std::pair<const void*, void*>> statics;
};

struct Options {
  int order = 0;  // of threads and blocks: 0 first in first out, 1 last in first out, 2 random
  uint64_t seed = 1;
  bool late_copies = true;  // cp.async lands at its wait; false: at once
  bool strict_exit = true;  // report a thread that returns before a barrier of its block
  int profile_block = -1;   // record memory accesses of this block
};
extern Options options;

constexpr size_t kStackBytes = 128 * 1024, kArenaBytes = 256 * 1024;
constexpr size_t kMostShared = 227 * 1024, kMostStatic = 48 * 1024;
constexpr uint32_t kSharedBase = 1024;  // lower shared addresses are never valid

extern Block block;
extern std::vector<Fiber> fibers;
extern uint8_t *stacks, *stacks_end, *arena, *arena_end;
extern const void* parameters;
extern size_t parameter_bytes;
extern uint32_t epoch, first_epoch_of_launch;
inline Fiber* me() { return static_cast<Fiber*>(current); }
uint64_t random_number();

// --- Scheduler ---------------------------------------------------------------------------------
extern Body body;
void fiber_main();  // what every fiber runs
void make_ready(Fiber* fiber);
void forget_ready();
// Until no fiber can go on. Returns why, if that is not because all have returned.
std::string run_block();

// --- Findings ----------------------------------------------------------------------------------
void report(const std::string& text);
std::string take_findings();

// --- Detector ----------------------------------------------------------------------------------
enum Access : uint32_t { kRead = 1, kWrite = 2, kAtomic = 4, kByTheWarp = 8 };
// Whether kernels of this library are instrumented.
bool instrumented();
// Accesses of the current thread. `pc` is the address of the code.
void on_access(const void* p, size_t bytes, uint32_t kind, const void* pc);
void mark_pending(uint8_t* p, size_t bytes, bool pending);
void begin_launch();
void begin_block();
bool in_shared(const uint8_t* p, size_t bytes);

// Off while the runtime itself works: inline functions of the standard library may resolve to
// instrumented copies.
extern bool checking;
struct Quiet {
  bool before = checking;
  Quiet() { checking = false; }
  ~Quiet() { checking = before; }
};

// --- Profile -----------------------------------------------------------------------------------
void record_access(const void* p, size_t bytes, bool read, bool shared, const void* pc);
void clear_profile();
const char* profile_text();
uintptr_t image_begin();
uintptr_t image_end();

}  // namespace rlir::emu
