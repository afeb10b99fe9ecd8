// What makes a loss, statistics and scales of the sums of rows, for the CPU op and a CUDA kernel:
// rows are added in their order, each value by itself, so that both have the same bits.
//
// Internal linkage throughout: compiled once per instruction set.
#pragma once

#include "core/dtype.h"
#include "cpu/policy_loss.h"

namespace rlir::cpu {
namespace {  // nothing here may be shared between instruction sets

// A PolicyLossRow as an array of doubles.
enum PolicyLossValue {
  kRowTokens,
  kRowGain,
  kRowKl,
  kRowLogRatio,
  kRowWeight,
  kRowTruncated,
  kRowRatio,
  kRowSquare,
  kRowLowest,
  kRowHighest,
  kRowClippedLow,
  kRowClippedHigh,
  kRowClippedDelta,
  kRowOutside,
  kRowSlope,
  kRowPresent,
  kRowTerm,
  kRowValues
};
static_assert(sizeof(PolicyLossRow) == kRowValues * sizeof(double));

RLIR_ANYWHERE constexpr double at_least_one(double x) { return x > 1.0 ? x : 1.0; }

// Where the total of a value starts, and how a row's joins it. A NaN stays.
RLIR_ANYWHERE inline double first_total(int value) {
  return value == kRowLowest ? __builtin_inf() : value == kRowHighest ? -__builtin_inf() : 0.0;
}
RLIR_ANYWHERE inline double join_total(int value, double total, double own) {
  if (value == kRowLowest) return own >= total || total != total ? total : own;
  if (value == kRowHighest) return own <= total || total != total ? total : own;
  return total + own;
}

// What a row's loss is divided by, of its own.
RLIR_ANYWHERE inline double row_divisor(const PolicyLoss& f, double tokens) {
  return f.division == PolicyLossDivision::kRowMean ? at_least_one(tokens) : 1.0;
}

// What the sum over rows is divided by. `given`: max_length or normalizer, or 0 for what stands in
// for them.
RLIR_ANYWHERE inline double common_divisor(const PolicyLoss& f, double tokens, double given) {
  const double rows = at_least_one(static_cast<double>(f.rows));
  switch (f.division) {
    case PolicyLossDivision::kRowMean:
      return rows;
    case PolicyLossDivision::kLength:
      return rows * (given != 0.0 ? given : at_least_one(static_cast<double>(f.columns)));
    case PolicyLossDivision::kNormalizer:
      return given != 0.0 ? given : at_least_one(tokens);
    case PolicyLossDivision::kTokenMean:
      break;
  }
  return at_least_one(tokens);
}

RLIR_ANYWHERE inline void statistics_of(const PolicyLoss& f, const double (&total)[kRowValues],
                                        double (&out)[kPolicyLossStatistics]) {
  const double tokens = at_least_one(total[kRowTokens]);
  const double ratios = f.sequence ? at_least_one(total[kRowPresent]) : tokens;
  const double spread = total[kRowSquare] * ratios;
  const bool present = total[kRowPresent] > 0.0;
  out[kTokens] = total[kRowTokens];
  out[kKl] = total[kRowKl] / tokens;
  out[kOldKl] = (0.0 - total[kRowLogRatio]) / tokens;
  out[kRatio] = total[kRowRatio] / ratios;
  out[kRatioMin] = present ? total[kRowLowest] : 0.0;
  out[kRatioMax] = present ? total[kRowHighest] : 0.0;
  out[kEss] = spread > 0.0 && spread != __builtin_inf()
                  ? total[kRowRatio] * total[kRowRatio] / spread
              : spread != spread ? spread
                                 : 0.0;
  out[kClippedLow] = total[kRowClippedLow] / ratios;
  out[kClippedHigh] = total[kRowClippedHigh] / ratios;
  out[kClippedDelta] = total[kRowClippedDelta] / ratios;
  out[kOutside] = total[kRowOutside] / ratios;
  out[kImportance] = total[kRowWeight] / tokens;
  out[kTruncated] = total[kRowTruncated] / tokens;
}

}  // namespace
}  // namespace rlir::cpu
