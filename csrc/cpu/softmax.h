// The order in which a row's softmax is summed: the same for selected_logprob, which has the
// logits of many rows side by side, and sample_tokens, which has one row at a time. Their
// log-probabilities agree bit for bit because both do what stands here. CUDA kernels do too.
//
//   z_v        logit / temperature; -infinity outside the support
//   block b    columns 256 b .. 256 b + 255, counted from column 0 of the whole vocabulary
//   m_b        maximum of z in the block
//   e_v        exp(z_v - m_b); m_b = -infinity counts as 0
//   s_b, u_b   sums of e_v and e_v (z_v - m_b): column v goes to accumulator v mod 16, in order,
//              as float; the accumulators fold in a tree (i + 8, i + 4, i + 2, i + 1)
//   m          maximum of the m_b;  f_b = exp(m_b - m)
//   s, u       sums over b, in order and in double, of f_b s_b and f_b (u_b + (m_b - m) s_b)
//
//   logprob(t) = (z_t - m) - log s          entropy = log s - u / s
//
// Columns outside the support add an exact zero to every sum, so a loop may leave them out; a
// block without any is left out as a whole. Terms are e fma'd onto the sum, zero where e is.
#pragma once

#include "core/exp.h"

namespace rlir::cpu {
namespace {  // nothing here may be shared between instruction sets

constexpr int64_t kSoftmaxBlock = 256;
constexpr int kSoftmaxLanes = 16;

RLIR_ANYWHERE inline float minus_infinity() { return -__builtin_inff(); }

// What exp's argument is relative to.
RLIR_ANYWHERE inline Vf reference_of(Vf maximum) {
  return select(maximum == splat(minus_infinity()), Vf{}, maximum);
}

// e_v x_v for the sum u, where x_v = z_v - m_b may be -infinity.
RLIR_ANYWHERE inline Vf add_dot(Vf e, Vf x, Vf sum) {
  return fma(e, select(e > Vf{}, x, Vf{}), sum);
}

// Folds 16 accumulators, each a vector of rows or a single value, into the first.
template <typename T>
inline void fold_lanes(T* sums) {
  for (int half = kSoftmaxLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) sums[i] = sums[i] + sums[i + half];
  }
}

// One block joins a row's sums; `factor` is exp(m_b - m).
RLIR_ANYWHERE inline void join_block(float block_max, float max, float factor, float sum, float dot,
                                     double* s, double* u) {
  if (block_max == minus_infinity()) {  // sum is 0, or NaN
    *s += static_cast<double>(sum);
    return;
  }
  const double below = static_cast<double>(block_max) - static_cast<double>(max);
  *s += static_cast<double>(factor) * static_cast<double>(sum);
  *u += static_cast<double>(factor) * (static_cast<double>(dot) + below * static_cast<double>(sum));
}

// Never -0, which z = -0 beside a maximum of 0 would give: which of the two the maximum is depends
// on the order of comparisons.
RLIR_ANYWHERE inline float row_logprob(float z, float max, double log_sum) {
  return static_cast<float>(((static_cast<double>(z) - static_cast<double>(max)) - log_sum) + 0.0);
}

RLIR_ANYWHERE inline float row_entropy(double s, double u, double log_sum) {
  return static_cast<float>(log_sum - u / s);
}

}  // namespace
}  // namespace rlir::cpu
