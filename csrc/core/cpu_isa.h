// Which build of a CPU kernel runs here. Every kernel is compiled once per instruction set and
// chosen once per process, so that one binary runs everywhere and uses what the machine has.
#pragma once

namespace rlir {

// In order: an instruction set includes those before it.
enum class CpuIsa : int { kBaseline = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3, kAmx = 4 };
inline constexpr int kCpuIsaCount = 5;

const char* cpu_isa_name(CpuIsa isa);

// The best instruction set of this machine and operating system.
CpuIsa detected_cpu_isa();

// What kernels use: the detected one, or a lower one that RLIR_CPU_ISA names (baseline, avx2,
// avx512, avx512_bf16, amx). The variable can only lower it; a name that is unknown has no effect
// here, and loading the library in Python refuses it.
CpuIsa cpu_isa();

// Lowers what kernels use from now on, as RLIR_CPU_ISA does; returns what they used before. For
// tests, which run every instruction set in one process.
CpuIsa cap_cpu_isa(const char* name);

// For tests: from now on cap_cpu_isa("amx") is granted on a machine without AMX, whose tile
// instructions a handler of SIGILL does (csrc/emu/amx.cpp). Nothing else changes: no other name,
// no variable and no detection leads there. False, and without effect, where the machine lacks
// what else the build for AMX is compiled for.
bool amx_is_emulated();

// Features of interest and whether this machine has them, as "name" or "-name" separated by
// spaces, for people.
const char* cpu_features();

}  // namespace rlir

// The build of a kernel in rlir::cpu for this machine. Machines with AMX or with AVX-512's bfloat16
// instructions run the AVX-512 build of kernels that have no use for them.
#if defined(RLIR_X86)
#define RLIR_CPU_KERNEL(kernel)                                               \
  (::rlir::cpu_isa() >= ::rlir::CpuIsa::kAvx512 ? ::rlir::cpu::avx512::kernel \
   : ::rlir::cpu_isa() >= ::rlir::CpuIsa::kAvx2 ? ::rlir::cpu::avx2::kernel   \
                                                : ::rlir::cpu::baseline::kernel)
// The same for kernels with a build for AVX-512 with bfloat16 products.
#define RLIR_CPU_KERNEL_BF16(kernel)                                                   \
  (::rlir::cpu_isa() >= ::rlir::CpuIsa::kAvx512Bf16 ? ::rlir::cpu::avx512_bf16::kernel \
                                                    : RLIR_CPU_KERNEL(kernel))
// The same for kernels with a build for AMX as well.
#define RLIR_CPU_KERNEL_AMX(kernel)                                     \
  (::rlir::cpu_isa() >= ::rlir::CpuIsa::kAmx ? ::rlir::cpu::amx::kernel \
                                             : RLIR_CPU_KERNEL_BF16(kernel))
#else
#define RLIR_CPU_KERNEL(kernel) (::rlir::cpu::baseline::kernel)
#define RLIR_CPU_KERNEL_BF16(kernel) (::rlir::cpu::baseline::kernel)
#define RLIR_CPU_KERNEL_AMX(kernel) (::rlir::cpu::baseline::kernel)
#endif
