// Rows of a table, and their gradient. One build per instruction set; raw pointers only.
//
//   out[n] = weight[ids[n]]        dweight[v] = sum of dy[n] over n with ids[n] = v
//
// Bits. Sums are float32, one chain a row of the table in the order of n, whatever the threads:
// a thread has rows of the table to itself. Each is rounded once, at the end.
#pragma once

#include <stdint.h>

#include "core/dtype.h"

namespace rlir::cpu {

// float32 or bfloat16 each; rows [D] contiguous.
struct Embedding {
  const int64_t* ids;
  const void* weight;
  Dtype dtype, out_dtype;
  int64_t weight_stride, size;
  void* out;  // [N, D] contiguous
};

struct EmbeddingBackward {
  const void* dy;
  Dtype dtype, dw_dtype;
  int64_t dy_stride, size;
  const int64_t *order, *starts;  // the n of row v: order[starts[v] .. starts[v + 1]), ascending
  void* dw;                       // [V, D] contiguous
};

// Rows [begin, end) of out.
using EmbeddingRows = void(const Embedding&, int64_t begin, int64_t end);
// Rows [begin, end) of dweight. `scratch` holds two rows of floats, padded to whole groups of 16.
using EmbeddingGradient = void(const EmbeddingBackward&, int64_t begin, int64_t end,
                               float* scratch);

#define RLIR_EMBEDDING_BUILD(isa)       \
  namespace isa {                       \
  EmbeddingRows embedding;              \
  EmbeddingGradient embedding_backward; \
  }
RLIR_EMBEDDING_BUILD(baseline)
RLIR_EMBEDDING_BUILD(avx2)
RLIR_EMBEDDING_BUILD(avx512)
#undef RLIR_EMBEDDING_BUILD

}  // namespace rlir::cpu
