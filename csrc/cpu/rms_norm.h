// Root mean square normalisation and its gradients. One build per instruction set; raw pointers.
//
//   s_n = 1 / sqrt(mean_d x_nd^2 + eps)         y_nd = x_nd s_n w_d
//   dx  = s (w dy - x s^2 mean_d(x w dy))       dw_d = sum_n dy_nd x_nd s_n
//
// Arithmetic is float32. Sums over a row go to accumulator d mod 16 and fold in a tree; sums over
// rows (dw) run in order within a block of rows, and blocks are added in order. So a row's results
// depend on that row alone, whatever the batch, the threads and the instruction set; they are the
// bits of the rollout engine's norms (cpu/decoder.cpp).
#pragma once

#include <stdint.h>

#include "core/dtype.h"

namespace rlir::cpu {

inline constexpr int64_t kNormBlock = 64;  // rows whose share of dw is summed together

// Rows of `size` contiguous elements. float32 or bfloat16 each; the weight is float32.
struct RmsNorm {
  const void* x;
  Dtype x_dtype;
  int64_t x_stride;  // between rows
  const float* weight;
  void* out;  // [rows, size] contiguous
  Dtype out_dtype;
  float* scale;  // [rows]: s
  int64_t size;
  float eps;
};

struct RmsNormBackward {
  const void *x, *dy;
  Dtype x_dtype, dy_dtype;
  int64_t x_stride, dy_stride;
  const float *weight, *scale;
  void* dx;         // [rows, size] contiguous, x's format; or null
  float* partials;  // [blocks, size]: shares of dw; or null
  int64_t rows, size;
};

// Rows [begin, end). `scratch` holds a row of floats, padded to whole groups of 16.
using RmsNormKernel = void(const RmsNorm& args, int64_t begin, int64_t end, float* scratch);
// Blocks [begin, end) of kNormBlock rows. `scratch` holds two such rows.
using RmsNormBackwardKernel = void(const RmsNormBackward& args, int64_t begin, int64_t end,
                                   float* scratch);
// dw [size] of columns [begin, end): the sum of the blocks' shares.
using RmsNormWeightKernel = void(const float* partials, int64_t blocks, int64_t size, float* dw,
                                 int64_t begin, int64_t end);

#define RLIR_RMS_NORM_BUILD(isa)           \
  namespace isa {                          \
  RmsNormKernel rms_norm;                  \
  RmsNormBackwardKernel rms_norm_backward; \
  RmsNormWeightKernel rms_norm_weight;     \
  }
RLIR_RMS_NORM_BUILD(baseline)
RLIR_RMS_NORM_BUILD(avx2)
RLIR_RMS_NORM_BUILD(avx512)
#undef RLIR_RMS_NORM_BUILD

}  // namespace rlir::cpu
