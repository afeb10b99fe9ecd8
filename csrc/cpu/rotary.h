// Rotary embedding (arXiv 2104.09864) and its transpose. One build per instruction set; raw
// pointers.
//
//   y_i = x_i cos_i - x_j sin_i        (i, j): (i, i + D/2), or (2i, 2i + 1) if interleaved
//   y_j = x_j cos_j + x_i sin_j
//
// Transposed, what its gradient is: y_i = x_i cos_i + x_j sin_j, y_j = x_j cos_j - x_i sin_i.
// float32 arithmetic, every product and sum rounded, and once more to the format of x. A head's
// result depends on that head alone.
#pragma once

#include <stdint.h>

#include "core/dtype.h"

namespace rlir::cpu {

struct Rotary {
  const void* x;  // [B, T, H, D]: float32 or bfloat16, contiguous in D
  Dtype dtype;
  int64_t x_batch, x_token, x_head;  // strides
  const float *cosine, *sine;        // [T, D] or [B, T, D], contiguous
  int64_t table_batch;               // stride; 0 for [T, D]
  void* out;                         // [B, T, H, D] contiguous, x's format
  int64_t tokens, heads, dim;
  bool interleaved, transposed;
};

// Tokens [begin, end) of all B T.
using RotaryKernel = void(const Rotary& args, int64_t begin, int64_t end);

#define RLIR_ROTARY_BUILD(isa) \
  namespace isa {              \
  RotaryKernel rotary;         \
  }
RLIR_ROTARY_BUILD(baseline)
RLIR_ROTARY_BUILD(avx2)
RLIR_ROTARY_BUILD(avx512)
#undef RLIR_ROTARY_BUILD

}  // namespace rlir::cpu
