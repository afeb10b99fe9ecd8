// Finds races, accesses out of bounds, reads of what was never written, writes to inputs, unaligned
// accesses. Kernel files are compiled with -fsanitize=thread,alignment,bounds and call what this
// file defines in place of the sanitizers' own libraries.
//
// Each byte of shared memory and of writable tensors has a cell with its last plain write, atomic
// and read: who, and at which barrier. Two accesses by different threads, one of them a write, race
// unless a barrier of the block (or, within a warp, a __syncwarp that both joined) lies between.
// Nothing orders blocks of one launch. Atomics have records of their own, or a thread's atomic
// would hide its plain write.
#include <cstdio>

#include "emu/runtime.h"

namespace rlir::emu {

bool checking = false;

namespace {

bool instrumented_ = false;

constexpr uint16_t kNobody = 0xffff, kSeveralWarps = 0xfffe, kOneWarp = 0x8000;  // or-ed to a warp
struct Record {
  uint32_t epoch = 0, time = 0, block = 0, pc = 0;
  uint16_t thread = kNobody;
};
struct Cell {
  Record write, atomic, read;
  uint32_t written = 0;  // epoch of the first write that counts
  bool pending = false;  // a cp.async has not landed
};
struct Buffer {
  const uint8_t* begin;
  size_t bytes;
  std::string name;
  bool writable;
  std::vector<Cell> cells;
};

std::vector<Buffer> buffers;
std::vector<Cell> shared_cells;
uint32_t first_epoch_of_block;

uint32_t offset_of(const void* pc) {
  return static_cast<uint32_t>(reinterpret_cast<uintptr_t>(pc) - image_begin());
}

std::string code(uint32_t pc) {
  char text[16];
  snprintf(text, sizeof text, "@%x", pc);
  return text;
}

bool ordered_by_warp(int a, int b, uint32_t time) {
  return a / 32 == b / 32 && me()->warp->synced[a % 32][b % 32] > time;
}

bool races(const Record& last, bool shared, bool by_the_warp) {
  if (last.thread == kNobody || last.epoch < first_epoch_of_launch) return false;
  if (!shared && last.block != block.linear) return true;
  if (last.epoch != block.epoch) return false;
  if (last.thread == kSeveralWarps) return true;
  const int own = current->linear;
  if (last.thread & kOneWarp) {
    const int warp = last.thread & ~kOneWarp;
    if (warp != own / 32) return true;
    for (int lane = 0; lane < 32; ++lane) {
      if (lane != current->lane && (me()->warp->lanes >> lane & 1) &&
          !ordered_by_warp(own, warp * 32 + lane, last.time)) {
        return true;
      }
    }
    return false;
  }
  if (last.thread == own && !by_the_warp) return false;
  return !ordered_by_warp(own, last.thread, last.time);
}

// An earlier record that is ordered before this access need not be kept: what comes after this one
// comes after both.
void note(Record& record, uint32_t pc, bool merge) {
  const uint16_t own = static_cast<uint16_t>(current->linear);
  if (merge && record.block == block.linear && races(record, true, false)) {
    const int warp = record.thread == kSeveralWarps ? -1
                     : record.thread & kOneWarp     ? record.thread & ~kOneWarp
                                                    : record.thread / 32;
    const bool same = warp == own / 32;
    record.thread = same ? static_cast<uint16_t>(kOneWarp | warp) : kSeveralWarps;
  } else {
    record.thread = own;
  }
  record.epoch = block.epoch;
  record.block = block.linear;
  record.time = me()->warp->time;
  record.pc = pc;
}

void check_cells(Cell* cells, size_t bytes, uint32_t kind, uint32_t pc, const std::string& name,
                 bool shared) {
  const bool atomic = kind & kAtomic, write = kind & kWrite, warp = kind & kByTheWarp;
  const char* own = atomic ? "atomic" : write ? "write" : "read";
  bool found = false;  // one finding for all bytes of an access
  const auto compare = [&](const Record& last, const char* other) {
    if (found || !races(last, shared, warp)) return;
    found = true;
    const bool blocks = !shared && last.block != block.linear;
    report(std::string(blocks ? "race between blocks" : "race") + " in " + name + ": " + other +
           " " + code(last.pc) + ", " + own + " " + code(pc));
  };
  for (size_t i = 0; i < bytes; ++i) {
    Cell& cell = cells[i];
    compare(cell.write, "write");
    if (!atomic) compare(cell.atomic, "atomic");
    if (atomic || write) compare(cell.read, "read");
    if (atomic || !write) {
      const bool known = cell.written >= (shared ? first_epoch_of_block : 1);
      if (cell.pending && !found) {
        found = true;
        report("read of " + name + " before its cp.async was waited for " + code(pc));
      } else if (!known && !found) {
        found = true;
        report("read of " + name + " that was never written " + code(pc));
      }
    }
    if (atomic) {
      note(cell.atomic, pc, true);
    } else if (write) {
      note(cell.write, pc, false);
    } else {
      note(cell.read, pc, true);
    }
    if (atomic || write) cell.written = block.epoch;
  }
}

bool within(const void* p, const void* begin, const void* end) { return p >= begin && p < end; }

void check_alignment(const uint8_t* p, size_t bytes, const std::string& name, uint32_t pc) {
  const bool power = (bytes & (bytes - 1)) == 0;
  if (power && reinterpret_cast<uintptr_t>(p) % (bytes > 16 ? 16 : bytes) != 0) {
    report("unaligned access of " + std::to_string(bytes) + " bytes in " + name + " " + code(pc));
  }
}

void check_shared(const uint8_t* p, size_t bytes, uint32_t kind, const void* pc) {
  if (!in_shared(p, bytes)) {
    fail(
        "out of bounds: %zu bytes at offset %td of shared memory, which has %zu static and %zu "
        "dynamic bytes @%x",
        bytes, p >= block.dynamic ? p - block.dynamic : p - block.shared, block.static_bytes,
        block.dynamic_bytes, offset_of(pc));
  }
  check_alignment(p, bytes, "shared memory", offset_of(pc));
  check_cells(&shared_cells[p - arena], bytes, kind, offset_of(pc), "shared memory", true);
}

void check_global(const uint8_t* p, size_t bytes, uint32_t kind, const void* pc) {
  Buffer* buffer = nullptr;
  for (Buffer& b : buffers) {
    if (within(p, b.begin, b.begin + b.bytes)) buffer = &b;
  }
  if (buffer == nullptr || p + bytes > buffer->begin + buffer->bytes) {
    const char* name = "any tensor";
    ptrdiff_t at = 0;
    size_t best = SIZE_MAX, size = 0;
    for (const Buffer& b : buffers) {
      const size_t distance = p < b.begin ? b.begin - p : p - b.begin;
      if (distance >= best) continue;
      best = distance;
      name = b.name.c_str();
      at = p - b.begin;
      size = b.bytes;
    }
    fail("out of bounds: %s of %zu bytes at byte %td of %s, which has %zu @%x",
         kind & kRead ? "read" : "write", bytes, at, name, size, offset_of(pc));
  }
  check_alignment(p, bytes, buffer->name, offset_of(pc));
  if ((kind & (kWrite | kAtomic)) && !buffer->writable) {
    report("write to the input " + buffer->name + " " + code(offset_of(pc)));
  } else if (buffer->writable) {
    check_cells(&buffer->cells[p - buffer->begin], bytes, kind, offset_of(pc), buffer->name, false);
  }
}

}  // namespace

bool instrumented() { return instrumented_; }

void begin_launch() {
  if (instrumented_ && shared_cells.empty()) shared_cells.resize(kArenaBytes);
}

void begin_block() { first_epoch_of_block = block.epoch; }

bool in_shared(const uint8_t* p, size_t bytes) {
  const auto inside = [=](const uint8_t* begin, size_t size) {
    return p >= begin && p + bytes <= begin + size;
  };
  return inside(block.shared, block.static_bytes) || inside(block.dynamic, block.dynamic_bytes);
}

void on_access(const void* pointer, size_t bytes, uint32_t kind, const void* pc) {
  if (!checking || current == nullptr || within(pointer, stacks, stacks_end)) return;
  Quiet quiet;
  const uint8_t* p = static_cast<const uint8_t*>(pointer);
  const bool shared = within(p, arena, arena_end);
  if (shared) {
    check_shared(p, bytes, kind, pc);
  } else {
    if (within(p, fibers.data(), fibers.data() + fibers.size())) return;  // threadIdx, blockIdx
    const uint8_t* parameter = static_cast<const uint8_t*>(parameters);
    if (within(p, parameter, parameter + parameter_bytes)) return;
    const uintptr_t address = reinterpret_cast<uintptr_t>(p);
    if (address >= image_begin() && address < image_end()) return;  // constants, blockDim
    check_global(p, bytes, kind, pc);
  }
  if (static_cast<int>(block.linear) == options.profile_block) {
    record_access(p, bytes, kind & kRead, shared, pc);
  }
}

void touch_atomic(const void* p, size_t bytes, const void* pc) { on_access(p, bytes, kAtomic, pc); }

void mark_pending(uint8_t* p, size_t bytes, bool pending) {
  if (!instrumented_) return;
  for (size_t i = 0; i < bytes; ++i) shared_cells[p - arena + i].pending = pending;
}

// What a launch may touch: kept until forget_buffers().
void add_buffer(const void* p, size_t bytes, const char* name, bool writable, bool written) {
  if (!instrumented_ || bytes == 0) return;
  Cell cell;
  cell.written = written ? 1 : 0;
  buffers.push_back({static_cast<const uint8_t*>(p), bytes, name, writable, {}});
  if (writable) buffers.back().cells.assign(bytes, cell);
}

void forget_buffers() { buffers.clear(); }

static void undefined(const char* what, const void* data) {
  struct Place {
    const char* file;
    uint32_t line, column;
  };
  const Place* place = static_cast<const Place*>(data);
  Quiet quiet;
  report(std::string(what) + " at " + place->file + ":" + std::to_string(place->line));
}

}  // namespace rlir::emu

// --- What instrumented code calls ----------------------------------------------------------------

#define HIDDEN __attribute__((visibility("hidden")))
#define PC __builtin_return_address(0)
using rlir::emu::kRead;
using rlir::emu::kWrite;
using rlir::emu::on_access;
extern "C" {
HIDDEN void __tsan_init() { rlir::emu::instrumented_ = true; }
HIDDEN void __tsan_func_entry(void*) {}
HIDDEN void __tsan_func_exit() {}
#define ACCESSES(n)                                                               \
  HIDDEN void __tsan_read##n(void* p) { on_access(p, n, kRead, PC); }             \
  HIDDEN void __tsan_write##n(void* p) { on_access(p, n, kWrite, PC); }           \
  HIDDEN void __tsan_unaligned_read##n(void* p) { on_access(p, n, kRead, PC); }   \
  HIDDEN void __tsan_unaligned_write##n(void* p) { on_access(p, n, kWrite, PC); } \
  HIDDEN void __tsan_volatile_read##n(void* p) { on_access(p, n, kRead, PC); }    \
  HIDDEN void __tsan_volatile_write##n(void* p) { on_access(p, n, kWrite, PC); }  \
  HIDDEN void __tsan_read##n##_pc(void* p, void*) { on_access(p, n, kRead, PC); } \
  HIDDEN void __tsan_write##n##_pc(void* p, void*) { on_access(p, n, kWrite, PC); }
ACCESSES(1)
ACCESSES(2)
ACCESSES(4)
ACCESSES(8)
ACCESSES(16)
HIDDEN void __tsan_read_range(void* p, size_t n) { on_access(p, n, kRead, PC); }
HIDDEN void __tsan_write_range(void* p, size_t n) { on_access(p, n, kWrite, PC); }
HIDDEN void __tsan_vptr_update(void**, void*) {}
HIDDEN void __tsan_vptr_read(void**) {}
HIDDEN void* __tsan_memset(void* p, int value, size_t n) {
  on_access(p, n, kWrite, PC);
  return memset(p, value, n);
}
HIDDEN void* __tsan_memcpy(void* to, const void* from, size_t n) {
  on_access(from, n, kRead, PC);
  on_access(to, n, kWrite, PC);
  return memcpy(to, from, n);
}
HIDDEN void* __tsan_memmove(void* to, const void* from, size_t n) {
  on_access(from, n, kRead, PC);
  on_access(to, n, kWrite, PC);
  return memmove(to, from, n);
}
HIDDEN void __ubsan_handle_type_mismatch_v1(void* data, uintptr_t) {
  rlir::emu::undefined("unaligned or null access", data);
}
HIDDEN void __ubsan_handle_out_of_bounds(void* data, uintptr_t) {
  rlir::emu::undefined("index out of an array's bounds", data);
}
HIDDEN void __ubsan_handle_shift_out_of_bounds(void* data, uintptr_t, uintptr_t) {
  rlir::emu::undefined("shift out of range", data);
}
HIDDEN void __ubsan_handle_divrem_overflow(void* data, uintptr_t, uintptr_t) {
  rlir::emu::undefined("integer division by zero", data);
}
}
