// Fibers and what they wait for. A fiber that must wait switches straight to the next ready one;
// none ready and some not done is a deadlock. Everything runs on one thread of the system.
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <map>

#include "emu/runtime.h"

#if !defined(__x86_64__)
#error "the emulator switches fibers in x86-64 assembly"
#endif

namespace rlir::emu {

namespace {

std::vector<Fiber*> ready;
size_t first_ready;
void* host_stack_pointer;
bool failed;
std::string failure;
std::map<std::string, int> findings;

// Saves the callee-saved registers on the stack and continues on another one.
extern "C" void rlir_emu_switch(void** save, void* load);
asm(R"(
.text
.globl rlir_emu_switch
.hidden rlir_emu_switch
.type rlir_emu_switch,@function
rlir_emu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  popq %rcx
  jmp *%rcx
.size rlir_emu_switch, .-rlir_emu_switch
)");

Fiber* next() {
  if (first_ready == ready.size()) return nullptr;
  Fiber* fiber;
  if (options.order == 0) {
    fiber = ready[first_ready++];
  } else if (options.order == 1) {
    fiber = ready.back();
    ready.pop_back();
  } else {
    const size_t i = first_ready + random_number() % (ready.size() - first_ready);
    fiber = ready[i];
    ready[i] = ready.back();
    ready.pop_back();
  }
  if (first_ready == ready.size()) {
    ready.clear();
    first_ready = 0;
  }
  return fiber;
}

// Leaves this stack for the next ready fiber, or for the host if there is none.
void leave(void** save) {
  Fiber* fiber = next();
  if (fiber == nullptr) {
    rlir_emu_switch(save, host_stack_pointer);
    return;
  }
  fiber->state = State::kRunning;
  if (fiber == current) return;
  current = fiber;
  rlir_emu_switch(save, fiber->stack_pointer);
}

void wait() {
  Fiber* fiber = me();
  leave(&fiber->stack_pointer);
  current = fiber;
}

[[noreturn]] void stop() {
  failed = true;
  void* abandoned;
  rlir_emu_switch(&abandoned, host_stack_pointer);
  abort();
}

std::string place(const Fiber& fiber) {
  return std::string(fiber.file) + ":" + std::to_string(fiber.line);
}

void release(std::vector<Fiber*>& waiting, bool whole_block) {
  for (const Fiber* fiber : waiting) {
    const Fiber* other = waiting[0];
    if (fiber->file == other->file && fiber->line == other->line) continue;
    report("divergent barrier: thread " + std::to_string(other->linear) + " at " + place(*other) +
           ", thread " + std::to_string(fiber->linear) + " at " + place(*fiber));
    break;
  }
  if (whole_block) block.epoch = ++epoch;
  std::vector<Fiber*> released;
  released.swap(waiting);
  for (Fiber* fiber : released) {
    if (fiber != current) make_ready(fiber);
  }
}

std::string deadlock() {
  std::map<std::string, int> places;
  int returned = 0;
  for (const Fiber& fiber : fibers) {
    if (fiber.state == State::kDone) {
      ++returned;
    } else {
      ++places[std::string(fiber.what) + " at " + place(fiber)];
    }
  }
  std::string text = "deadlock:";
  for (const auto& [where, count] : places) {
    text += " " + std::to_string(count) + " threads wait in " + where + ";";
  }
  return text + " " + std::to_string(returned) + " have returned";
}

void report_exits(const Fiber& waiting) {
  if (!options.strict_exit) return;
  report("exit before barrier: " + std::to_string(block.threads - block.alive) +
         " threads of the block returned before the barrier at " + place(waiting));
}

}  // namespace

void fiber_main() {
  checking = instrumented();
  body(parameters);
  checking = false;
  Fiber* fiber = me();
  if (!fiber->copies.empty()) {
    report("cp.async: a thread returned without waiting for its copy of " +
           std::string(fiber->copies[0].file) + ":" + std::to_string(fiber->copies[0].line));
  }
  fiber->state = State::kDone;
  --block.alive;
  auto& waiting = block.waiting[0];
  if (block.alive > 0 && static_cast<int>(waiting.size()) == block.alive) {
    report_exits(*waiting[0]);
    release(waiting, true);
  }
  void* abandoned;
  leave(&abandoned);
  abort();
}

void make_ready(Fiber* fiber) {
  fiber->state = State::kReady;
  ready.push_back(fiber);
}

void forget_ready() {
  ready.clear();
  first_ready = 0;
}

std::string run_block() {
  failed = false;
  failure.clear();
  leave(&host_stack_pointer);
  checking = false;
  current = nullptr;
  return failed ? failure : block.alive > 0 ? deadlock() : std::string();
}

std::string take_findings() {
  std::string text;
  for (const auto& [finding, count] : findings) {
    if (!text.empty()) text += "; ";
    text += finding + (count > 1 ? " (" + std::to_string(count) + " times)" : "");
  }
  findings.clear();
  return text;
}

void report(const std::string& text) {
  Quiet quiet;
  ++findings[text];
}

void fail(const char* format, ...) {
  checking = false;  // run() sets it again
  char text[1024];
  va_list values;
  va_start(values, format);
  vsnprintf(text, sizeof text, format, values);
  va_end(values);
  failure = text;
  if (current != nullptr) {
    const Thread& t = *current;
    snprintf(text, sizeof text, " [block (%u, %u, %u) thread (%u, %u, %u)]", t.block.x, t.block.y,
             t.block.z, t.thread.x, t.thread.y, t.thread.z);
    failure += text;
  }
  stop();
}

// On a GPU the launch would go on in other threads and its results would be lost; here it goes on
// so that tests can look at them.
void device_assertion(const char* text) { report(std::string("device assertion: ") + text); }

void yield() {
  Quiet quiet;
  make_ready(me());
  wait();
}

void barrier(int id, int threads, const char* file, int line) {
  Quiet quiet;
  Fiber* fiber = me();
  fiber->file = file;
  fiber->line = line;
  fiber->what = "a barrier";
  fiber->state = State::kBarrier;
  auto& waiting = block.waiting[id];
  waiting.push_back(fiber);
  const int needed = threads != 0 ? threads : block.alive;
  if (threads == 0 && block.alive != block.threads) report_exits(*fiber);
  if (static_cast<int>(waiting.size()) == needed) {
    fiber->state = State::kRunning;
    release(waiting, threads == 0 || threads == block.threads);
  } else {
    wait();
  }
}

void collective(void* argument, uint32_t mask, Collective compute, const char* what,
                const char* file, int line) {
  Quiet quiet;
  Fiber* fiber = me();
  Warp* warp = fiber->warp;
  if ((mask >> fiber->lane & 1) == 0) {
    fail("%s at %s:%d: mask %08x does not hold the calling lane %d", what, file, line, mask,
         fiber->lane);
  }
  if ((mask & ~warp->lanes) != 0 && mask != 0xffffffffu) {
    fail("%s at %s:%d: mask %08x names lanes that do not exist", what, file, line, mask);
  }
  mask &= warp->lanes;  // the last warp of a block may be part of one
  fiber->argument = argument;
  fiber->mask = mask;
  fiber->compute = compute;
  fiber->what = what;
  fiber->file = file;
  fiber->line = line;
  fiber->state = State::kCollective;
  warp->waiting |= 1u << fiber->lane;
  void* arguments[32] = {};
  bool complete = (warp->waiting & mask) == mask;
  for (int lane = 0; lane < 32 && complete; ++lane) {
    if ((mask >> lane & 1) == 0) continue;
    const Fiber* other = warp->fiber[lane];
    complete = other->compute == compute && other->mask == mask;
    arguments[lane] = other->argument;
    if (complete && (other->line != line || other->file != file)) {
      report(std::string("divergent ") + what + ": lane " + std::to_string(fiber->lane) + " at " +
             place(*fiber) + ", lane " + std::to_string(lane) + " at " + place(*other));
    }
  }
  if (!complete) {
    wait();
    return;
  }
  compute(arguments, mask);
  warp->waiting &= ~mask;
  for (int lane = 0; lane < 32; ++lane) {
    if ((mask >> lane & 1) && lane != fiber->lane) make_ready(warp->fiber[lane]);
  }
  fiber->state = State::kRunning;
}

static void sync_lanes(void** arguments, uint32_t mask) {
  Warp* warp = nullptr;
  for (int i = 0; i < 32; ++i) {
    if (mask >> i & 1) warp = static_cast<Warp*>(arguments[i]);
  }
  ++warp->time;
  for (int i = 0; i < 32; ++i) {
    for (int j = 0; j < 32; ++j) {
      if ((mask >> i & 1) && (mask >> j & 1)) warp->synced[i][j] = warp->time;
    }
  }
}

void sync_warp(uint32_t mask, const char* file, int line) {
  collective(me()->warp, mask, sync_lanes, "__syncwarp", file, line);
}

}  // namespace rlir::emu
