// Tile instructions one by one, and the product of cpu/tiles.h alone, for ctypes.
#include "core/simd.h"
#include "cpu/product.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

using namespace rlir::cpu;

// c += a b, tiles of any shape: `config` is what ldtilecfg reads, of tiles 0 (c), 1 (a) and 2 (b).
EXPORT void dot(const void* config, float* c, int64_t c_stride, const void* a, int64_t a_stride,
                const void* b, int64_t b_stride) {
  __asm__ volatile("" : "+r"(config)::"memory");
  _tile_loadconfig(config);
  _tile_loadd(0, c, c_stride);
  _tile_loadd(1, a, a_stride);
  _tile_loadd(2, b, b_stride);
  _tile_dpbf16ps(0, 1, 2);
  _tile_stored(0, c, c_stride);
  _tile_release();
}

// A tile of `config` goes from `from` to each of the five `to` [16][64], by way of every kind of
// operand, and the configuration to `kept` [3][64]: as loaded, as loaded again, after the release.
EXPORT void operands(const void* config, const char* from, char* to, char* kept) {
  alignas(64) static char known[64];
  __builtin_memcpy(known, config, sizeof known);
  __asm__ volatile(
      "ldtilecfg %[known]\n"  // relative to rip
      "sttilecfg (%[kept])\n"
      "mov %[config], %%r13\n"
      "ldtilecfg (%%r13)\n"  // encoded with a displacement of 0
      "sttilecfg 64(%[kept])\n"
      "mov $64, %%r9\n"
      "tileloadd (%[from],%%r9), %%tmm7\n"
      "mov %[to], %%r12\n"
      "tilestored %%tmm7, (%%r12,%%r9)\n"  // r12: as rsp, always with a SIB byte
      "mov $32, %%r14\n"
      "lea 4096(%[from]), %%r15\n"
      "tileloaddt1 -4096(%%r15,%%r14,2), %%tmm3\n"  // a displacement of four bytes
      "tilestored %%tmm3, 1024(%%r12,%%r9)\n"
      "lea -100(%[from]), %%rbx\n"
      "mov $16, %%rax\n"
      "tileloadd 100(%%rbx,%%rax,4), %%tmm0\n"  // of one byte
      "mov $8, %%r8\n"
      "lea 2048(%[to]), %%rdx\n"
      "tilestored %%tmm0, (%%rdx,%%r8,8)\n"
      "tileloadd (%[from]), %%tmm2\n"  // no index: every row is the first
      "tilestored %%tmm2, 3072(%%r12,%%r9)\n"
      "tilezero %%tmm0\n"
      "tilestored %%tmm0, 4096(%%r12,%%r9)\n"
      "tilerelease\n"
      "sttilecfg 128(%[kept])\n"
      :
      : [known] "m"(known), [config] "r"(config), [from] "r"(from), [to] "r"(to), [kept] "r"(kept)
      : "memory", "rax", "rdx", "rbx", "r8", "r9", "r12", "r13", "r14", "r15");
}

// Zeros [16][64 bytes] to `to`.
EXPORT void store(const void* config, void* to, int64_t stride) {
  __asm__ volatile("" : "+r"(config)::"memory");
  _tile_loadconfig(config);
  _tile_zero(0);
  _tile_stored(0, to, stride);
  _tile_release();
}

// What a processor refuses: tiles that nobody configured.
EXPORT void unconfigured() { _tile_zero(0); }

// c [count rounded up to 32][48] of rows against a panel.
EXPORT void product(float* c, const uint32_t* rows, int64_t stride, int64_t count,
                    const uint32_t* panel, int64_t words, int lanes, int more) {
  const ProductScope<PairFormat> scope;
  panel_product<PairFormat>(c, rows, stride, count, panel, words, lanes, more != 0);
}
