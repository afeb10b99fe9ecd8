// Products of a linear layer, each of them one product of rows with rows. One build per instruction
// set; raw pointers only.
//
//   out[i][j] = sum_k rows[i][k] lanes[j][k] + bias[j]
//
//   y  = x W^T + b    rows x  [n][k]    lanes W   [o][k]    k inputs
//                     of few x: rows W, lanes x, the result turned: W is not packed then
//   dx = dy W         rows dy [n][o]    lanes W^T [k][o]    over outputs
//   dW = dy^T x       rows dy^T [o][n]  lanes x^T [k][n]    over rows
//   db = sum_n dy     by columns
//
// Layout. Lanes are packed in panels (cpu/product.h), a panel at a time, by the thread that then
// takes it through its rows: it stays in the second level cache. Rows are read where they lie if
// their words are the operands' own (float32; pairs of bfloat16), else they are packed once.
//
// Bits. An output is the chain of cpu/product.h over k, whatever the position in a panel, the
// blocks and the threads; the bias is added last. Operands of a bfloat16 product are rounded as
// cpu/words.h does it; by AMX their products have the order of cpu/tiles.h. These are the products
// of cpu/decoder.h. db: float32 sums of kLinearChain rows, added up in order in float64.
#pragma once

#include <stdint.h>

#include "core/matrix.h"

namespace rlir::cpu {

inline constexpr int64_t kLinearTurned = 48;   // at most so many x: one panel with AVX-512
inline constexpr int64_t kLinearColumns = 64;  // of db, a task: whole cache lines

// float32 or bfloat16 operands [index][k], one of the strides 1.
struct LinearProduct {
  Matrix rows, lanes;
  int64_t count, outputs, depth;  // I, J, K
  bool bfloat16;                  // what operands are rounded to; or float32
  const float* bias;              // [J] or [I], or null
  void* out;                      // [I][J] contiguous; or [J][I]
  bool turned;                    // it is [J][I], and the bias [I]
  Dtype out_dtype;
  void* packed;  // LinearSizes::row bytes a row, rows in whole groups of 16
};

// In bytes, but for `panels`.
struct LinearSizes {
  int64_t row;      // of LinearProduct::packed; 0 if rows are read where they lie
  int64_t panels;   // panels of J
  int64_t scratch;  // of a task, aligned to 64
};

using LinearSizesOf = LinearSizes(const LinearProduct&);
// Rows [begin, end) of `packed`; begin is a multiple of 16.
using LinearPack = void(const LinearProduct&, int64_t begin, int64_t end);
using LinearTiles = void(const LinearProduct&, int64_t row_begin, int64_t row_end,
                         int64_t panel_begin, int64_t panel_end, void* scratch);
// Columns [begin, end) of db [o], begin a multiple of 16; dy [o][n], as the rows of dW.
using LinearBias = void(const Matrix& dy, int64_t rows, int64_t columns, float* db, int64_t begin,
                        int64_t end);

#define RLIR_LINEAR_BUILD(isa) \
  namespace isa {              \
  LinearSizesOf linear_sizes;  \
  LinearPack linear_pack;      \
  LinearTiles linear_tiles;    \
  LinearBias linear_bias;      \
  }
RLIR_LINEAR_BUILD(baseline)
RLIR_LINEAR_BUILD(avx2)
RLIR_LINEAR_BUILD(avx512)
RLIR_LINEAR_BUILD(avx512_bf16)
RLIR_LINEAR_BUILD(amx)
#undef RLIR_LINEAR_BUILD

}  // namespace rlir::cpu
