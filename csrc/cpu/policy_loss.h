// The policy's loss (GRPO and its relatives), forward and backward. One build per instruction
// set; raw pointers only. With a token's log-probabilities p (policy), o (old), q (reference),
// u (rollout) and advantage A:
//
//   l = p - o;  c = exp(l), or exp(mean of l over the row) at sequence level
//   v = min(exp(o - u), truncated)                            1 without u, or where u is NaN
//   clipped:  gain = min(min(c, delta) A, clamp(c, low, high) A) v
//   cispo:    gain = min(c, high) A p v, where c is a constant
//   kl:       k1 = p - q,  k2 = (p - q)^2 / 2,  k3 = exp(min(q - p, 20)) - (q - p) - 1;
//             with kl_importance times c
//   loss    = sum over rows of scale[row] sum over tokens of (kl_weight kl - gain)
//
// A token outside the mask adds nothing, whatever it holds; nor does the gain of a token whose
// advantage is 0, whatever its ratio. Other NaN stay NaN.
#pragma once

#include <stdint.h>

#include "core/dtype.h"

namespace rlir::cpu {

enum class KlEstimator : int32_t { kK1, kK2, kK3 };
// What scale[row] is 1 over: rows by their tokens and the rows, tokens, rows times a length, or a
// normalizer.
enum class PolicyLossDivision : int32_t { kRowMean, kTokenMean, kLength, kNormalizer };

struct PolicyLoss {
  // [rows, columns], strides in elements (0: broadcast); data is null where there is none.
  struct Matrix {
    const void* data;
    Dtype dtype;
    int64_t row_stride, stride;
  };
  Matrix logprob, old_logprob, advantages, ref_logprob, rollout_logprob;
  const bool* mask;  // or null: all tokens count
  int64_t mask_row_stride, mask_stride;
  int64_t rows, columns;
  bool float64;  // compute in double, otherwise in float
  bool cispo;
  bool sequence;
  KlEstimator kl;
  bool kl_importance;
  double low, high, delta;  // bounds of the ratio; infinities where there are none
  double kl_weight;
  double truncated;
  PolicyLossDivision division;
};

// Sums over the tokens of a row that count. At sequence level, what is of the ratio (from `ratio`
// on) is the mean over the row's tokens instead: a row counts once.
struct PolicyLossRow {
  double tokens, gain, kl, log_ratio, weight, truncated;
  double ratio, square, lowest, highest;  // c, c^2, extremes of c
  double clipped_low, clipped_high, clipped_delta, outside;
  double slope;    // sequence level: d loss / d p of every token by way of the row's ratio
  double present;  // 1 if a token counts
  double term;     // of the loss, before it is divided by what all rows share
};

// In the order of PolicyLossStatistics in Python.
enum PolicyLossStatistic {
  kTokens,
  kKl,
  kOldKl,
  kRatio,
  kRatioMin,
  kRatioMax,
  kEss,
  kClippedLow,
  kClippedHigh,
  kClippedDelta,
  kOutside,
  kImportance,
  kTruncated,
  kPolicyLossStatistics
};

// Rows [begin, end) into `out` [rows]. A row's bits depend on the row alone.
using PolicyLossKernel = void(const PolicyLoss& args, int64_t begin, int64_t end,
                              PolicyLossRow* out);

// d loss / d logprob of rows [begin, end) into `gradient`, contiguous, in the dtype of logprob.
// `scales` [rows]: what a row's loss is multiplied by. `slopes` and `ratios` [rows]: of the forward
// pass, read at sequence level.
using PolicyLossBackwardKernel = void(const PolicyLoss& args, int64_t begin, int64_t end,
                                      const double* scales, const double* slopes,
                                      const double* ratios, void* gradient);

namespace baseline {
PolicyLossKernel policy_loss;
PolicyLossBackwardKernel policy_loss_backward;
}  // namespace baseline
namespace avx2 {
PolicyLossKernel policy_loss;
PolicyLossBackwardKernel policy_loss_backward;
}  // namespace avx2
namespace avx512 {
PolicyLossKernel policy_loss;
PolicyLossBackwardKernel policy_loss_backward;
}  // namespace avx512

}  // namespace rlir::cpu
