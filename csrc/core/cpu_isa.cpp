#include "core/cpu_isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <string>

#if defined(RLIR_X86)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace rlir {
namespace {

struct Features {
  bool avx2 = false, fma = false, f16c = false, bmi2 = false;
  bool avx512f = false, avx512bw = false, avx512dq = false, avx512vl = false, avx512cd = false;
  bool avx512_bf16 = false, avx512_vnni = false;
  bool amx_tile = false, amx_bf16 = false, amx_int8 = false;
  bool amx_granted = false;  // the kernel let this process use tiles
};

#if defined(RLIR_X86)

// Tiles are 8 KiB of state that Linux hands out only on request; without it the first tile
// instruction raises SIGILL. Threads started later inherit the permission.
bool request_amx() {
  constexpr long kArchReqXcompPerm = 0x1023, kXfeatureXtileData = 18;
  return syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureXtileData) == 0;
}

Features read_features() {
  // __builtin_cpu_supports also asks XCR0, that is whether the system saves the registers.
  __builtin_cpu_init();
  Features f;
  f.avx2 = __builtin_cpu_supports("avx2");
  f.fma = __builtin_cpu_supports("fma");
  f.bmi2 = __builtin_cpu_supports("bmi2");
  f.avx512f = __builtin_cpu_supports("avx512f");
  f.avx512bw = __builtin_cpu_supports("avx512bw");
  f.avx512dq = __builtin_cpu_supports("avx512dq");
  f.avx512vl = __builtin_cpu_supports("avx512vl");
  f.avx512cd = __builtin_cpu_supports("avx512cd");
  f.avx512_bf16 = __builtin_cpu_supports("avx512bf16");
  f.avx512_vnni = __builtin_cpu_supports("avx512vnni");
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (__get_cpuid(1, &a, &b, &c, &d)) f.f16c = (c >> 29) & 1;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d)) {
    f.amx_bf16 = (d >> 22) & 1;
    f.amx_tile = (d >> 24) & 1;
    f.amx_int8 = (d >> 25) & 1;
  }
  if (f.amx_tile && f.amx_bf16) f.amx_granted = request_amx();
  return f;
}

#else

Features read_features() { return {}; }

#endif

const Features& features() {
  static const Features found = read_features();
  return found;
}

CpuIsa detect() {
  const Features& f = features();
  // What -march=x86-64-v3 and x86-64-v4 let the compiler use.
  const bool avx2 = f.avx2 && f.fma && f.f16c && f.bmi2;
  const bool avx512 = avx2 && f.avx512f && f.avx512bw && f.avx512dq && f.avx512vl && f.avx512cd;
  if (avx512 && f.avx512_bf16 && f.amx_granted) return CpuIsa::kAmx;
  if (avx512 && f.avx512_bf16) return CpuIsa::kAvx512Bf16;
  if (avx512) return CpuIsa::kAvx512;
  if (avx2) return CpuIsa::kAvx2;
  return CpuIsa::kBaseline;
}

std::atomic<bool> emulated_amx{false};

CpuIsa lowered_to(const char* cap) {
  const CpuIsa best = detected_cpu_isa();
  if (cap == nullptr) return best;
  if (emulated_amx && std::strcmp(cap, cpu_isa_name(CpuIsa::kAmx)) == 0) return CpuIsa::kAmx;
  for (int i = 0; i < static_cast<int>(best); ++i) {
    if (std::strcmp(cap, cpu_isa_name(static_cast<CpuIsa>(i))) == 0) return static_cast<CpuIsa>(i);
  }
  return best;
}

std::atomic<CpuIsa>& chosen() {
  static std::atomic<CpuIsa> isa = lowered_to(std::getenv("RLIR_CPU_ISA"));
  return isa;
}

std::string describe() {
  const Features& f = features();
  std::string text;
  const auto add = [&text](const char* name, bool here) {
    text += text.empty() ? "" : " ";
    text += here ? "" : "-";
    text += name;
  };
  add("avx2", f.avx2);
  add("fma", f.fma);
  add("f16c", f.f16c);
  add("avx512f", f.avx512f);
  add("avx512bw", f.avx512bw);
  add("avx512dq", f.avx512dq);
  add("avx512vl", f.avx512vl);
  add("avx512_vnni", f.avx512_vnni);
  add("avx512_bf16", f.avx512_bf16);
  add("amx_tile", f.amx_tile);
  add("amx_bf16", f.amx_bf16);
  add("amx_int8", f.amx_int8);
  return text;
}

}  // namespace

const char* cpu_isa_name(CpuIsa isa) {
  static constexpr const char* kNames[kCpuIsaCount] = {"baseline", "avx2", "avx512", "avx512_bf16",
                                                       "amx"};
  return kNames[static_cast<int>(isa)];
}

CpuIsa detected_cpu_isa() {
  static const CpuIsa isa = detect();
  return isa;
}

CpuIsa cpu_isa() { return chosen().load(std::memory_order_relaxed); }

CpuIsa cap_cpu_isa(const char* name) {
  return chosen().exchange(lowered_to(name), std::memory_order_relaxed);
}

bool amx_is_emulated() {
  if (detected_cpu_isa() < CpuIsa::kAvx512Bf16) return false;
  emulated_amx = true;
  return true;
}

const char* cpu_features() {
  static const std::string text = describe();
  return text.c_str();
}

}  // namespace rlir
