// rlir._build_info: what was built and what this machine can run. Needs no torch at run time.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "core/cpu_isa.h"

#if defined(__clang__)
#define RLIR_COMPILER "clang " __clang_version__
#else
#define RLIR_COMPILER "gcc " __VERSION__
#endif

namespace py = pybind11;

PYBIND11_MODULE(_build_info, m) {
  m.doc() = "What the native library was built with, and what this machine can run.";
  m.attr("version") = RLIR_VERSION;
  m.attr("torch_version") = RLIR_TORCH_VERSION;
  m.attr("compiler") = RLIR_COMPILER;
  m.attr("build_type") = RLIR_BUILD_TYPE;
#if defined(RLIR_X86)
  const std::vector<std::string> compiled = {"baseline", "avx2", "avx512", "avx512_bf16", "amx"};
#else
  const std::vector<std::string> compiled = {"baseline"};
#endif
  m.attr("cpu_isas") = py::tuple(py::cast(compiled));
  m.attr("cuda_archs") = py::tuple(py::str(RLIR_CUDA_ARCHS).attr("split")());

  m.def(
      "cpu_isa_names",
      [] {
        std::vector<std::string> names;
        for (int i = 0; i < rlir::kCpuIsaCount; ++i) {
          names.emplace_back(rlir::cpu_isa_name(static_cast<rlir::CpuIsa>(i)));
        }
        return py::tuple(py::cast(names));
      },
      "The names RLIR_CPU_ISA may have, lowest first.");
  m.def(
      "detected_cpu_isa", [] { return rlir::cpu_isa_name(rlir::detected_cpu_isa()); },
      "The best instruction set of this machine.");
  m.def(
      "used_cpu_isa", [] { return rlir::cpu_isa_name(rlir::cpu_isa()); },
      "What kernels use: the detected one unless RLIR_CPU_ISA caps it.");
  m.def(
      "cpu_features", [] { return rlir::cpu_features(); },
      "CPU features of interest, a minus before those that are missing.");
}
