// rlir::cap_cpu_isa(isa) -> the one before: which build of the CPU kernels runs, for tests.
#include "core/cpu_isa.h"

#include <torch/csrc/stable/library.h>

#include <string>

namespace rlir {
namespace {

std::string cap_cpu_isa_op(std::string isa) { return cpu_isa_name(cap_cpu_isa(isa.c_str())); }

}  // namespace

// For ctypes; not an operator, so that nobody comes by it.
extern "C" __attribute__((visibility("default"))) int rlir_amx_is_emulated() {
  return amx_is_emulated() ? 1 : 0;
}

STABLE_TORCH_LIBRARY_FRAGMENT(rlir, m) { m.def("cap_cpu_isa(str isa) -> str"); }

STABLE_TORCH_LIBRARY_IMPL(rlir, CompositeExplicitAutograd, m) {
  m.impl("cap_cpu_isa", TORCH_BOX(&cap_cpu_isa_op));
}

}  // namespace rlir
