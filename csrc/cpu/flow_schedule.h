// The schedules of flow_sde_step as coefficients of a row, in double, on every device.
//
// With dt = sigma - sigma' > 0:
//   flow_grpo  s = a sqrt(sigma / (1 - sigma)), at sigma = 1 over 1 - sigma'; std = s sqrt(dt)
//   dance      s = a;                                                         std = s sqrt(dt)
//     both:    mean = x - (v + s^2 / (2 sigma) (x + (1 - sigma) v)) dt
//   cps        std = sigma' sin(pi a / 2)
//              mean = (1 - sigma') (x - sigma v) + sqrt(sigma'^2 - std^2) (x + (1 - sigma) v)
#pragma once

#include "core/exp.h"

namespace rlir::cpu {

struct FlowCoefficients {
  double sample, velocity, std, precision, constant;
};

enum class FlowSchedule : int32_t { kFlowGrpo, kDance, kCps };

struct FlowNoise {
  FlowSchedule schedule;
  double level;  // a
  double sine;   // sin(pi a / 2)
};

RLIR_ANYWHERE static inline double flow_root(double x) {
#if defined(__CUDACC__)
  return sqrt(x);
#else
  return __builtin_sqrt(x);
#endif
}

RLIR_ANYWHERE static inline bool flow_sigma_ok(double sigma) { return sigma > 0.0 && sigma <= 1.0; }
RLIR_ANYWHERE static inline bool flow_next_ok(double sigma, double next) {
  return next >= 0.0 && next < sigma;
}

RLIR_ANYWHERE static inline FlowCoefficients flow_coefficients(const FlowNoise& noise, double sigma,
                                                               double next) {
  if (noise.schedule == FlowSchedule::kCps) {
    const double std = next * noise.sine;
    const double kept = flow_root((next - std) * (next + std));
    return {(1.0 - next) + kept, kept * (1.0 - sigma) - (1.0 - next) * sigma, std, 1.0, 0.0};
  }
  const double dt = sigma - next;
  const double s = noise.schedule == FlowSchedule::kDance
                       ? noise.level
                       : noise.level * flow_root(sigma / (1.0 - (sigma < 1.0 ? sigma : next)));
  const double drift = s * s / (2.0 * sigma), std = s * flow_root(dt);
  FlowCoefficients k{1.0 - drift * dt, -(1.0 + drift * (1.0 - sigma)) * dt, std, 0.0, 0.0};
  if (std > 0.0) {  // a step without noise has no density: its log-probability is 0
    k.precision = 1.0 / (2.0 * std * std);
    k.constant = log(std) + 0x1.d67f1c864beb4p-1;  // ln sqrt(2 pi)
  }
  return k;
}

// What the finished sum of squares makes of a row's log-probability.
RLIR_ANYWHERE static inline double flow_logprob(const FlowCoefficients& k, double squares,
                                                int64_t size) {
  return -k.precision * (squares / static_cast<double>(size)) - k.constant;
}
// d logprob / d mean_i = slope (next_i - mean_i).
RLIR_ANYWHERE static inline double flow_slope(const FlowCoefficients& k, double dlogprob,
                                              int64_t size) {
  return dlogprob * (2.0 * k.precision / static_cast<double>(size));
}

}  // namespace rlir::cpu
