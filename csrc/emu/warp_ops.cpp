// Shared memory, cp.async, ldmatrix and mma.sync: what csrc/cuda/ptx.cuh calls.
#include <algorithm>

#include "emu/runtime.h"

namespace rlir::emu {

void* dynamic_shared() { return block.dynamic; }

void* static_shared(const void* key, size_t bytes, size_t alignment) {
  Quiet quiet;
  for (const auto& [known, p] : block.statics) {
    if (known == key) return p;
  }
  alignment = std::max<size_t>(alignment, 16);
  const size_t at = (block.static_bytes + alignment - 1) / alignment * alignment;
  block.static_bytes = at + bytes;
  if (block.static_bytes > kMostStatic) fail("more than 48 KiB of static shared memory");
  if (block.static_bytes + block.dynamic_bytes > kMostShared) {
    fail("more than 227 KiB of shared memory");
  }
  block.statics.emplace_back(key, block.shared + at);
  return block.shared + at;
}

uint32_t shared_address(const void* pointer) {
  const uint8_t* p = static_cast<const uint8_t*>(pointer);
  if (p < arena || p > arena_end) fail("the shared address of a pointer to other memory");
  return kSharedBase + static_cast<uint32_t>(p - arena);
}

static uint8_t* shared_pointer(uint32_t address, size_t bytes) {
  uint8_t* p = arena + (address - kSharedBase);
  if (address < kSharedBase || !in_shared(p, bytes)) {
    fail("out of bounds: %zu bytes at address %u, outside the block's shared memory", bytes,
         address);
  }
  return p;
}

// --- cp.async ------------------------------------------------------------------------------------

static void land(const Copy& copy) {
  mark_pending(copy.to, copy.size, false);
  on_access(copy.to, copy.size, kWrite, copy.pc);
  Quiet quiet;
  memcpy(copy.to, copy.from, copy.bytes);
  memset(copy.to + copy.bytes, 0, copy.size - copy.bytes);
}

void cp_async(uint32_t to, const void* from, uint32_t size, uint32_t bytes, const char* file,
              int line) {
  const void* pc = __builtin_return_address(0);
  uint8_t* target = shared_pointer(to, size);
  if (to % size != 0) fail("cp.async at %s:%d: the target is not aligned", file, line);
  if (reinterpret_cast<uintptr_t>(from) % size != 0) {
    fail("cp.async at %s:%d: the source is not aligned", file, line);
  }
  if (bytes > size) fail("cp.async at %s:%d: %u bytes of %u", file, line, bytes, size);
  if (bytes > 0) on_access(from, bytes, kRead, pc);
  on_access(target, size, kWrite, pc);
  Quiet quiet;
  const Copy copy{target, from, size, bytes, -1, file, line, pc};
  if (!options.late_copies) {
    land(copy);
    return;
  }
  memset(target, 0xff, size);
  mark_pending(target, size, true);
  me()->copies.push_back(copy);
}

void cp_async_commit() {
  Quiet quiet;
  for (Copy& copy : me()->copies) {
    if (copy.group < 0) copy.group = me()->committed;
  }
  ++me()->committed;
}

void cp_async_wait(int pending) {
  const int done = me()->committed - pending;
  auto& copies = me()->copies;
  size_t kept = 0;
  for (size_t i = 0; i < copies.size(); ++i) {
    const Copy copy = copies[i];
    if (copy.group >= 0 && copy.group < done) {
      land(copy);
    } else {
      copies[kept++] = copy;
    }
  }
  Quiet quiet;
  copies.resize(kept);
}

// --- ldmatrix, mma -------------------------------------------------------------------------------

namespace {

struct Load {
  uint32_t* r;
  int matrices;
  bool transposed;
  uint32_t address;
  const void* pc;
  bool check;
};

void load_matrices(void** arguments, uint32_t) {
  const Load& own = *static_cast<Load*>(arguments[0]);
  Thread* before = current;
  Warp* warp = me()->warp;
  for (int m = 0; m < own.matrices; ++m) {
    const uint16_t* row[8];
    for (int i = 0; i < 8; ++i) {
      const int lane = m * 8 + i;
      const Load& load = *static_cast<Load*>(arguments[lane]);
      if (load.address % 16 != 0) fail("ldmatrix: the row of lane %d is not aligned", lane);
      current = warp->fiber[lane];  // whose access it is
      const uint8_t* p = shared_pointer(load.address, 16);
      checking = load.check;
      on_access(p, 16, kRead | kByTheWarp, load.pc);
      checking = false;
      row[i] = reinterpret_cast<const uint16_t*>(p);
    }
    current = before;
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = lane % 4;
      const uint32_t low = own.transposed ? row[2 * t][g] : row[g][2 * t];
      const uint32_t high = own.transposed ? row[2 * t + 1][g] : row[g][2 * t + 1];
      static_cast<Load*>(arguments[lane])->r[m] = low | high << 16;
    }
  }
}

struct Product {
  float* d;
  const uint32_t *a, *b;
};

float low(uint32_t x) { return __builtin_bit_cast(float, x << 16); }
float high(uint32_t x) { return __builtin_bit_cast(float, x & 0xffff0000u); }

void multiply(void** arguments, uint32_t) {
  float a[16][16], b[16][8], d[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const Product& p = *static_cast<Product*>(arguments[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) {
      const int row = g + 8 * (i & 1), column = 2 * t + 8 * (i >> 1);
      a[row][column] = low(p.a[i]);
      a[row][column + 1] = high(p.a[i]);
      d[g + 8 * (i >> 1)][2 * t + (i & 1)] = p.d[i];
    }
    for (int i = 0; i < 2; ++i) {
      b[2 * t + 8 * i][g] = low(p.b[i]);
      b[2 * t + 8 * i + 1][g] = high(p.b[i]);
    }
  }
  for (int i = 0; i < 16; ++i) {
    for (int k = 0; k < 16; ++k) {
      for (int j = 0; j < 8; ++j) d[i][j] += a[i][k] * b[k][j];
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    const Product& p = *static_cast<Product*>(arguments[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) p.d[i] = d[g + 8 * (i >> 1)][2 * t + (i & 1)];
  }
}

}  // namespace

void ldmatrix(uint32_t* r, int matrices, bool transposed, uint32_t address, const char* file,
              int line) {
  Load load{r, matrices, transposed, address, __builtin_return_address(0), checking};
  const char* what = transposed ? "ldmatrix.trans" : "ldmatrix";
  collective(&load, 0xffffffffu, load_matrices, what, file, line);
}

void mma_bf16(float* d, const uint32_t* a, const uint32_t* b, const char* file, int line) {
  Product product{d, a, b};
  collective(&product, 0xffffffffu, multiply, "mma.m16n8k16", file, line);
}

}  // namespace rlir::emu
