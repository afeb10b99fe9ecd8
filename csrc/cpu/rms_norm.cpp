// Formulas and order of sums: rms_norm.h.
//
// Why one kernel: eager PyTorch in another dtype than the weight's leaves its fused kernel, and its
// bits depend on the vector width of the machine. A row is read once and kept in the first cache.
#include "cpu/rms_norm.h"

#include "cpu/rows.h"
#include "cpu/softmax.h"

namespace rlir::cpu::RLIR_ISA {
namespace {

inline int64_t padded(int64_t n) { return (n + 15) / 16 * 16; }

inline float fold(const Vf* sums) {
  float lanes[16];
  for (int part = 0; part < kPer16; ++part) store_vector(lanes + part * kWidth, sums[part]);
  fold_lanes(lanes);
  return lanes[0];
}

// A weight's element beyond the row's end is not there: the row's own padding is zero.
inline Vf weight_at(const float* weight, int64_t at, int64_t n) {
  if (at + kWidth <= n) return load_vector(weight + at);
  Vf out = {};
  for (int64_t i = at; i < n; ++i) out[i - at] = weight[i];
  return out;
}

}  // namespace

void rms_norm(const RmsNorm& a, int64_t begin, int64_t end, float* row) {
  const int64_t size = padded(a.size);
  for (int64_t n = begin; n < end; ++n) {
    load_row(row, a.x, a.x_dtype, n * a.x_stride, a.size);
    Vf sums[kPer16] = {};
    for (int64_t k = 0; k < size; k += 16) {
#pragma GCC unroll 4
      for (int part = 0; part < kPer16; ++part) {
        const Vf value = load_vector(row + k + part * kWidth);
        sums[part] = fma(value, value, sums[part]);
      }
    }
    const float scale = 1.0f / __builtin_sqrtf(fold(sums) / static_cast<float>(a.size) + a.eps);
    a.scale[n] = scale;
    for (int64_t k = 0; k < size; k += kWidth) {
      store_vector(row + k, load_vector(row + k) * splat(scale) * weight_at(a.weight, k, a.size));
    }
    store_row(a.out, a.out_dtype, n * a.size, row, a.size);
  }
}

void rms_norm_backward(const RmsNormBackward& a, int64_t begin, int64_t end, float* scratch) {
  const int64_t size = padded(a.size);
  float *x = scratch, *dy = scratch + size;
  for (int64_t block = begin; block < end; ++block) {
    float* share = a.partials == nullptr ? nullptr : a.partials + block * a.size;
    for (int64_t k = 0; share != nullptr && k < a.size; ++k) share[k] = 0.0f;
    const int64_t last = (block + 1) * kNormBlock < a.rows ? (block + 1) * kNormBlock : a.rows;
    for (int64_t n = block * kNormBlock; n < last; ++n) {
      load_row(x, a.x, a.x_dtype, n * a.x_stride, a.size);
      load_row(dy, a.dy, a.dy_dtype, n * a.dy_stride, a.size);
      const float s = a.scale[n];
      if (share != nullptr) {
        int64_t k = 0;
        for (; k + kWidth <= a.size; k += kWidth) {
          const Vf term = load_vector(x + k) * splat(s);
          store_vector(share + k, fma(term, load_vector(dy + k), load_vector(share + k)));
        }
        for (; k < a.size; ++k) share[k] = __builtin_fmaf(x[k] * s, dy[k], share[k]);
      }
      if (a.dx == nullptr) continue;
      Vf sums[kPer16] = {};
      for (int64_t k = 0; k < size; k += 16) {
#pragma GCC unroll 4
        for (int part = 0; part < kPer16; ++part) {
          const int64_t at = k + part * kWidth;
          const Vf g = load_vector(dy + at) * weight_at(a.weight, at, a.size);
          store_vector(dy + at, g);
          sums[part] = fma(g, load_vector(x + at), sums[part]);
        }
      }
      const float along = fold(sums) * s * s * s / static_cast<float>(a.size);
      for (int64_t k = 0; k < size; k += kWidth) {
        const Vf across = load_vector(dy + k) * splat(s);
        store_vector(dy + k, fma(load_vector(x + k), splat(-along), across));
      }
      store_row(a.dx, a.x_dtype, n * a.size, dy, a.size);
    }
  }
}

void rms_norm_weight(const float* partials, int64_t blocks, int64_t size, float* dw, int64_t begin,
                     int64_t end) {
  for (int64_t k = begin; k < end; ++k) dw[k] = 0.0f;
  for (int64_t block = 0; block < blocks; ++block) {
    const float* share = partials + block * size;
    for (int64_t k = begin; k < end; ++k) dw[k] += share[k];
  }
}

}  // namespace rlir::cpu::RLIR_ISA
