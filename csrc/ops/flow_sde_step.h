// rlir::flow_sde_step and its backward: schemas and checks, for every device. What the kernels
// compute: cpu/flow_sde_step.h.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cmath>
#include <numbers>
#include <optional>
#include <string>

#include "core/check.h"
#include "cpu/flow_sde_step.h"
#include "ops/float_dtype.h"

namespace rlir {

inline constexpr const char* kFlowSdeStepSchema =
    "flow_sde_step(Tensor velocity, Tensor sample, Tensor sigma, Tensor sigma_next, "
    "Tensor? previous, Tensor seed, Tensor offset, Tensor? row_ids=None, *, str schedule, "
    "float noise_level) -> (Tensor, Tensor, Tensor, Tensor)";
inline constexpr const char* kFlowSdeBackwardSchema =
    "flow_sde_step_backward(Tensor? dlogprob, Tensor? dmean, Tensor reached, Tensor mean, "
    "Tensor sigma, Tensor sigma_next, *, str schedule, float noise_level) -> Tensor";

// Blocks of four words are counted in 32 bits.
inline constexpr int64_t kLargestFlowRow = int64_t{1} << 34;

inline cpu::FlowNoise flow_noise(const std::string& name, double noise_level) {
  RLIR_CHECK(std::isfinite(noise_level) && noise_level >= 0.0,
             "flow_sde_step: noise_level must be finite and >= 0, got ", noise_level);
  const double sine = std::sin(std::numbers::pi * noise_level / 2.0);
  if (name == "flow_grpo") return {cpu::FlowSchedule::kFlowGrpo, noise_level, sine};
  if (name == "dance") return {cpu::FlowSchedule::kDance, noise_level, sine};
  RLIR_CHECK(name == "cps", "flow_sde_step: schedule must be 'flow_grpo', 'dance' or 'cps', got '",
             name, "'");
  RLIR_CHECK(noise_level <= 1.0, "flow_sde_step: noise_level must be at most 1 for 'cps', got ",
             noise_level);
  return {cpu::FlowSchedule::kCps, noise_level, sine};
}

inline void check_flow_device(const std::string& what, const torch::stable::Tensor& x,
                              const torch::stable::Tensor& like) {
  RLIR_CHECK(x.device() == like.device(), what,
             " must be on the device of sample, got another device");
}

inline void check_flow_shape(const char* name, const torch::stable::Tensor& x,
                             const torch::stable::Tensor& sample) {
  const std::string what = std::string("flow_sde_step: ") + name;
  check_flow_device(what, x, sample);
  bool same = x.dim() == sample.dim();
  for (int64_t d = 0; same && d < x.dim(); ++d) same = x.size(d) == sample.size(d);
  RLIR_CHECK(same, what, " must have the shape of sample, got another shape");
}

inline int64_t flow_row_size(const torch::stable::Tensor& x) {
  RLIR_CHECK(x.dim() >= 1, "flow_sde_step: sample must have rows, got no dimension");
  int64_t size = 1;
  for (int64_t d = 1; d < x.dim(); ++d) size *= x.size(d);
  RLIR_CHECK(size >= 1 && size < kLargestFlowRow,
             "flow_sde_step: sample must have 1 to 2^34 - 1 elements a row, got ", size);
  return size;
}

// A number of each row.
inline Dtype check_flow_numbers(const char* name, const torch::stable::Tensor& x,
                                const torch::stable::Tensor& like) {
  const std::string what = std::string("flow_sde_step: ") + name;
  check_flow_device(what, x, like);
  RLIR_CHECK(x.dim() == 1 && x.size(0) == like.size(0), what, " must have shape (", like.size(0),
             ",), got another shape");
  return float_dtype(what.c_str(), x);
}

// A number of the call.
inline void check_flow_number(const char* name, const torch::stable::Tensor& x,
                              const torch::stable::Tensor& like) {
  const std::string what = std::string("flow_sde_step: ") + name;
  check_flow_device(what, x, like);
  RLIR_CHECK(x.scalar_type() == torch::headeronly::ScalarType::Long && x.numel() == 1, what,
             " must be one int64, got ", x.numel(), " of dtype ",
             static_cast<int>(x.scalar_type()));
}

inline void check_flow_ids(const torch::stable::Tensor& ids, const torch::stable::Tensor& sample) {
  check_flow_device("flow_sde_step: row_ids", ids, sample);
  RLIR_CHECK(ids.scalar_type() == torch::headeronly::ScalarType::Long,
             "flow_sde_step: row_ids must be int64, got dtype ",
             static_cast<int>(ids.scalar_type()));
  RLIR_CHECK(ids.dim() == 1 && ids.size(0) == sample.size(0),
             "flow_sde_step: row_ids must have shape (", sample.size(0), ",), got another shape");
}

inline Dtype flow_real(const torch::stable::Tensor& mean) {
  const Dtype real = float_dtype("flow_sde_step: mean", mean);
  RLIR_CHECK(real == Dtype::kFloat64 || real == Dtype::kFloat32,
             "flow_sde_step: mean must be float64 or float32, got dtype ",
             static_cast<int>(mean.scalar_type()));
  return real;
}

inline void check_flow_dmean(const torch::stable::Tensor& dmean,
                             const torch::stable::Tensor& mean) {
  check_flow_shape("d mean", dmean, mean);
  RLIR_CHECK(dmean.scalar_type() == mean.scalar_type(),
             "flow_sde_step: d mean must have the dtype of mean, got dtype ",
             static_cast<int>(dmean.scalar_type()));
}

}  // namespace rlir
