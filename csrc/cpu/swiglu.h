// The gate of a SiLU-gated MLP and its gradients. One build per instruction set; raw pointers.
//
//   y = g sigma(g) u,  sigma(g) = 1 / (1 + exp(-g))
//   du = dy g sigma(g)        dg = dy u sigma(g) (1 + g (1 - sigma(g)))
//
// Arithmetic is float32 with the project's exp, element by element: the same bits from every build,
// those of the rollout engine's gate (cpu/decoder.cpp).
#pragma once

#include <stdint.h>

#include "core/dtype.h"

namespace rlir::cpu {

// Rows of `size` contiguous elements, float32 or bfloat16 each.
struct Swiglu {
  const void *gate, *up;
  Dtype dtype;  // of both
  int64_t gate_stride, up_stride;
  void* out;  // [rows, size] contiguous
  Dtype out_dtype;
  int64_t size;
};

struct SwigluBackward {
  const void *gate, *up, *dy;
  Dtype dtype, dy_dtype;
  int64_t gate_stride, up_stride, dy_stride;
  void *dgate, *dup;  // in `dtype`
  int64_t dgate_stride, dup_stride;
  int64_t size;
};

// Rows [begin, end).
using SwigluKernel = void(const Swiglu& args, int64_t begin, int64_t end);
using SwigluBackwardKernel = void(const SwigluBackward& args, int64_t begin, int64_t end);

#define RLIR_SWIGLU_BUILD(isa)          \
  namespace isa {                       \
  SwigluKernel swiglu;                  \
  SwigluBackwardKernel swiglu_backward; \
  }
RLIR_SWIGLU_BUILD(baseline)
RLIR_SWIGLU_BUILD(avx2)
RLIR_SWIGLU_BUILD(avx512)
#undef RLIR_SWIGLU_BUILD

}  // namespace rlir::cpu
