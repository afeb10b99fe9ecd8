// AMX tile instructions on a processor without them, for tests: a handler of SIGILL decodes the
// instruction that was refused, does what Intel's manual says of it and goes on behind it. So the
// machine code of the build for AMX runs as it is; what this cannot show is what real tiles do
// where they differ from the manual, and any time.
//
// Covered: ldtilecfg, sttilecfg, tilerelease, tilezero, tileloadd, tileloaddt1, tilestored and
// tdpbf16ps (VEX.128.0F38.W0 49, 4B and 5C), with any memory operand of 64-bit code without a
// prefix for segment or address size. Anything else, and what the processor would refuse (tiles
// that are not configured, shapes that do not fit), goes to the handler that was there before.
//
// Under AddressSanitizer every row that a tile reads or writes is looked up in its shadow: the
// kernel's own tile loads are assembly, which the sanitizer does not see.
//
// No torch, no other file: tests/amxcheck/emulator.py compiles it.
#include <immintrin.h>
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <ucontext.h>
#include <unistd.h>

#include <atomic>

extern "C" __attribute__((weak)) void* __asan_region_is_poisoned(void* begin, size_t size);
extern "C" __attribute__((weak)) void __asan_report_error(void* pc, void* bp, void* sp, void* at,
                                                          int is_write, size_t size,
                                                          unsigned experiment);

namespace {

constexpr int kTiles = 8, kRows = 16, kRowBytes = 64, kLanes = kRowBytes / 4;

struct Config {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(Config) == 64);

struct alignas(64) Tile {
  uint8_t row[kRows][kRowBytes];
};

// Of a thread. It is first touched inside the handler, where making it may allocate: the signal is
// synchronous and comes from a kernel, which holds no lock of the allocator.
struct State {
  Config config;
  Tile tiles[kTiles];
};
thread_local State state;

struct sigaction before;
std::atomic<uint64_t> executed{0};

// Faults planted in the emulator, for tests of the tests.
enum Fault : int { kNone, kTruncates, kKeepsSubnormals, kSwapsRows, kAddsOddFirst };
std::atomic<int> planted{kNone};

// --- Instructions --------------------------------------------------------------------------------

bool configured(int tile) {
  return state.config.palette == 1 && state.config.rows[tile] != 0 &&
         state.config.row_bytes[tile] != 0;
}

bool accepted(const Config& c) {
  if (c.palette > 1 || c.start_row != 0)
    return false;  // a start row: never after an interrupt here
  for (uint8_t byte : c.reserved) {
    if (byte != 0) return false;
  }
  for (int i = 0; i < 16; ++i) {
    if (c.row_bytes[i] > kRowBytes || c.rows[i] > kRows) return false;
    if ((c.row_bytes[i] == 0) != (c.rows[i] == 0)) return false;
    if (i >= kTiles && c.rows[i] != 0) return false;
  }
  return true;
}

void release() { memset(&state, 0, sizeof state); }

void check_memory(void* row, size_t bytes, bool writes, const ucontext_t* context) {
  if (__asan_region_is_poisoned == nullptr) return;
  void* bad = __asan_region_is_poisoned(row, bytes);
  if (bad == nullptr) return;
  const greg_t* g = context->uc_mcontext.gregs;
  __asan_report_error(reinterpret_cast<void*>(g[REG_RIP]), reinterpret_cast<void*>(g[REG_RBP]),
                      reinterpret_cast<void*>(g[REG_RSP]), bad, writes, 1, 0);
}

bool load_config(const void* from, const ucontext_t* context) {
  check_memory(const_cast<void*>(from), sizeof(Config), false, context);
  Config config;
  memcpy(&config, from, sizeof config);
  if (!accepted(config)) return false;
  release();
  if (config.palette == 1) state.config = config;
  return true;
}

bool load_tile(int tile, const uint8_t* from, int64_t stride, const ucontext_t* context) {
  if (!configured(tile)) return false;
  Tile& to = state.tiles[tile];
  const int bytes = state.config.row_bytes[tile];
  memset(&to, 0, sizeof to);
  for (int i = 0; i < state.config.rows[tile]; ++i) {
    check_memory(const_cast<uint8_t*>(from + i * stride), bytes, false, context);
    memcpy(to.row[i], from + i * stride, bytes);
  }
  return true;
}

bool store_tile(int tile, uint8_t* to, int64_t stride, const ucontext_t* context) {
  if (!configured(tile)) return false;
  const int bytes = state.config.row_bytes[tile];
  for (int i = 0; i < state.config.rows[tile]; ++i) {
    check_memory(to + i * stride, bytes, true, context);
    memcpy(to + i * stride, state.tiles[tile].row[i], bytes);
  }
  return true;
}

// A pair of bfloat16 as two floats.
float even_of(uint32_t pair) { return __builtin_bit_cast(float, pair << 16); }
float odd_of(uint32_t pair) { return __builtin_bit_cast(float, pair & 0xffff0000u); }

// c += a b, under the MXCSR of the caller. Not inlined, or arithmetic could move across its change.
__attribute__((noinline)) void dot_products(Tile& c, const Tile& a, const Tile& b, int rows,
                                            int lanes, int pairs, int fault) {
  for (int m = 0; m < rows; ++m) {
    float even[kLanes] = {}, odd[kLanes] = {};
    for (int k = 0; k < pairs; ++k) {
      uint32_t x, y[kLanes];
      memcpy(&x, a.row[m] + 4 * k, sizeof x);
      memcpy(y, b.row[fault == kSwapsRows ? k ^ 1 : k], sizeof y);
      for (int n = 0; n < kLanes; ++n) {
        even[n] = __builtin_fmaf(even_of(x), even_of(y[n]), even[n]);
        odd[n] = __builtin_fmaf(odd_of(x), odd_of(y[n]), odd[n]);
      }
    }
    float sum[kLanes];
    memcpy(sum, c.row[m], sizeof sum);
    for (int n = 0; n < lanes; ++n) {
      sum[n] = fault == kAddsOddFirst ? sum[n] + odd[n] + even[n] : sum[n] + (even[n] + odd[n]);
    }
    memset(c.row[m], 0, kRowBytes);
    memcpy(c.row[m], sum, sizeof(float) * lanes);
  }
  for (int m = rows; m < kRows; ++m) memset(c.row[m], 0, kRowBytes);
}

bool multiply(int c, int a, int b) {
  if (c == a || c == b || a == b || !configured(c) || !configured(a) || !configured(b)) {
    return false;
  }
  const Config& is = state.config;
  if (is.row_bytes[c] % 4 != 0 || is.row_bytes[a] % 4 != 0 || is.row_bytes[b] % 4 != 0 ||
      is.rows[c] != is.rows[a] || is.row_bytes[a] / 4 != is.rows[b] ||
      is.row_bytes[c] != is.row_bytes[b]) {
    return false;
  }
  // Subnormals are zeros coming and going, to nearest even, no exceptions, whatever MXCSR says.
  constexpr unsigned kMasked = 0x1f80, kZeros = 0x8040, kTowardZero = 0x6000;
  const int fault = planted.load(std::memory_order_relaxed);
  const unsigned mode = _mm_getcsr();
  _mm_setcsr(kMasked | (fault == kKeepsSubnormals ? 0 : kZeros) |
             (fault == kTruncates ? kTowardZero : 0));
  dot_products(state.tiles[c], state.tiles[a], state.tiles[b], is.rows[c], is.row_bytes[c] / 4,
               is.row_bytes[a] / 4, fault);
  _mm_setcsr(mode);
  return true;
}

// --- Decoding ------------------------------------------------------------------------------------

int64_t general_register(const ucontext_t* context, int number) {
  static constexpr int kAt[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP,
                                  REG_RSI, REG_RDI, REG_R8,  REG_R9,  REG_R10, REG_R11,
                                  REG_R12, REG_R13, REG_R14, REG_R15};
  return context->uc_mcontext.gregs[kAt[number]];
}

// base + displacement and index times scale: an address is their sum, but the latter is the stride
// of a tile's rows.
struct Memory {
  int64_t start, stride;
  bool has_sib;
  int length;  // of ModRM, SIB and displacement
};

Memory memory_operand(const uint8_t* modrm, int high_index, int high_base,
                      const ucontext_t* context) {
  const int mod = *modrm >> 6, rm = *modrm & 7;
  Memory m{0, 0, rm == 4, 1};
  bool wide = mod == 2;
  if (m.has_sib) {
    const uint8_t sib = modrm[m.length++];
    const int index = (sib >> 3 & 7) | high_index, base = sib & 7;
    if (index != 4) m.stride = general_register(context, index) << (sib >> 6);
    if (mod == 0 && base == 5) {
      wide = true;
    } else {
      m.start = general_register(context, base | high_base);
    }
  } else if (mod == 0 && rm == 5) {
    wide = true;  // from the next instruction: these end with the displacement
    m.start = reinterpret_cast<int64_t>(modrm + 5);
  } else {
    m.start = general_register(context, rm | high_base);
  }
  if (wide) {
    int32_t displacement;
    memcpy(&displacement, modrm + m.length, sizeof displacement);
    m.start += displacement;
    m.length += 4;
  } else if (mod == 1) {
    m.start += static_cast<int8_t>(modrm[m.length++]);
  }
  return m;
}

// Does the instruction and returns its length; 0 if it is not one of ours.
int execute(const uint8_t* code, const ucontext_t* context) {
  constexpr int kNone0F = 0, k66 = 1, kF3 = 2, kF2 = 3;                             // VEX.pp
  if (code[0] != 0xc4 || (code[1] & 0x1f) != 2 || (code[2] & 0x84) != 0) return 0;  // 0F38, W0, 128
  const int high_reg = code[1] & 0x80 ? 0 : 8, high_index = code[1] & 0x40 ? 0 : 8;
  const int high_base = code[1] & 0x20 ? 0 : 8, extra = ~code[2] >> 3 & 15, prefix = code[2] & 3;
  const uint8_t *modrm = code + 4, opcode = code[3];
  const bool is_register = *modrm >> 6 == 3;
  const int reg = (*modrm >> 3 & 7) | high_reg, rm = (*modrm & 7) | high_base;
  if (opcode == 0x5c) {
    const bool ours = prefix == kF3 && is_register && reg < 8 && rm < 8 && extra < 8;
    return ours && multiply(reg, rm, extra) ? 5 : 0;
  }
  if ((opcode != 0x49 && opcode != 0x4b) || extra != 0) return 0;
  if (is_register) {
    if (opcode != 0x49) return 0;
    if (prefix == kNone0F && *modrm == 0xc0) {
      release();
      return 5;
    }
    if (prefix != kF2 || rm != 0 || reg >= 8 || !configured(reg)) return 0;
    memset(&state.tiles[reg], 0, sizeof(Tile));
    return 5;
  }
  const Memory m = memory_operand(modrm, high_index, high_base, context);
  auto* const start = reinterpret_cast<uint8_t*>(m.start);
  bool done = false;
  if (opcode == 0x49) {
    if (reg % 8 != 0) return 0;
    if (prefix == kNone0F) done = load_config(start + m.stride, context);
    if (prefix == k66) {
      check_memory(start + m.stride, sizeof(Config), true, context);
      memcpy(start + m.stride, &state.config, sizeof(Config));
      done = true;
    }
  } else if (m.has_sib && reg < 8) {
    if (prefix == kF2 || prefix == k66) done = load_tile(reg, start, m.stride, context);
    if (prefix == kF3) done = store_tile(reg, start, m.stride, context);
  }
  return done ? 4 + m.length : 0;
}

void on_illegal_instruction(int, siginfo_t*, void* raw) {
  auto* context = static_cast<ucontext_t*>(raw);
  greg_t& at = context->uc_mcontext.gregs[REG_RIP];
  if (const int length = execute(reinterpret_cast<const uint8_t*>(at), context)) {
    at += length;
    executed.fetch_add(1, std::memory_order_relaxed);
    return;
  }
  static constexpr char kText[] = "amx: no instruction that the emulator or the processor takes\n";
  if (write(STDERR_FILENO, kText, sizeof kText - 1) < 0) {
  }
  sigaction(SIGILL, &before, nullptr);  // which the instruction reaches as it runs again
}

}  // namespace

// Every thread of the process has tiles from now on. Again after another handler took over.
extern "C" __attribute__((visibility("default"))) int rlir_amx_install() {
  struct sigaction now{};
  if (sigaction(SIGILL, nullptr, &now) != 0) return -1;
  if ((now.sa_flags & SA_SIGINFO) != 0 && now.sa_sigaction == on_illegal_instruction) return 0;
  before = now;
  struct sigaction ours{};
  ours.sa_sigaction = on_illegal_instruction;
  ours.sa_flags = SA_SIGINFO;
  return sigaction(SIGILL, &ours, nullptr);
}

extern "C" __attribute__((visibility("default"))) uint64_t rlir_amx_executed() { return executed; }

extern "C" __attribute__((visibility("default"))) void rlir_amx_plant(int fault) {
  planted = fault;
}
