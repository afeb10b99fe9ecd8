// rlir::flow_sde_step and its backward: schema, checks, coefficients of the schedules, CPU
// dispatch. What the kernels compute: cpu/flow_sde_step.h.
//
// With dt = sigma - sigma' > 0:
//   flow_grpo  s = a sqrt(sigma / (1 - sigma)), at sigma = 1 over 1 - sigma'; std = s sqrt(dt)
//   dance      s = a;                                                         std = s sqrt(dt)
//     both:    mean = x - (v + s^2 / (2 sigma) (x + (1 - sigma) v)) dt
//   cps        std = sigma' sin(pi a / 2)
//              mean = (1 - sigma') (x - sigma v) + sqrt(sigma'^2 - std^2) (x + (1 - sigma) v)
#include "cpu/flow_sde_step.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cmath>
#include <numbers>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "core/check.h"
#include "core/cpu_isa.h"
#include "ops/float_dtype.h"

namespace rlir {
namespace {

using cpu::FlowCoefficients;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kChunksPerThread = 4;
constexpr int64_t kLargestRow = int64_t{1} << 34;  // blocks of four words are counted in 32 bits

enum class Schedule { kFlowGrpo, kDance, kCps };

Schedule schedule_of(const std::string& name, double noise_level) {
  RLIR_CHECK(std::isfinite(noise_level) && noise_level >= 0.0,
             "flow_sde_step: noise_level must be finite and >= 0, got ", noise_level);
  if (name == "flow_grpo") return Schedule::kFlowGrpo;
  if (name == "dance") return Schedule::kDance;
  RLIR_CHECK(name == "cps", "flow_sde_step: schedule must be 'flow_grpo', 'dance' or 'cps', got '",
             name, "'");
  RLIR_CHECK(noise_level <= 1.0, "flow_sde_step: noise_level must be at most 1 for 'cps', got ",
             noise_level);
  return Schedule::kCps;
}

FlowCoefficients coefficients_of(Schedule schedule, double a, double sigma, double next) {
  if (schedule == Schedule::kCps) {
    const double std = next * std::sin(std::numbers::pi * a / 2.0);
    const double kept = std::sqrt((next - std) * (next + std));
    return {(1.0 - next) + kept, kept * (1.0 - sigma) - (1.0 - next) * sigma, std, 1.0, 0.0};
  }
  const double dt = sigma - next;
  const double s = schedule == Schedule::kDance
                       ? a
                       : a * std::sqrt(sigma / (1.0 - (sigma < 1.0 ? sigma : next)));
  const double drift = s * s / (2.0 * sigma), std = s * std::sqrt(dt);
  FlowCoefficients k{1.0 - drift * dt, -(1.0 + drift * (1.0 - sigma)) * dt, std, 0.0, 0.0};
  if (std > 0.0) {  // a step without noise has no density: its log-probability is 0
    k.precision = 1.0 / (2.0 * std * std);
    k.constant = std::log(std) + 0.5 * std::log(2.0 * std::numbers::pi);
  }
  return k;
}

std::vector<double> numbers_of(const char* name, const Tensor& x, int64_t rows) {
  const std::string what = std::string("flow_sde_step: ") + name;
  RLIR_CHECK(x.is_cpu(), what, " must be on the CPU, got another device");
  RLIR_CHECK(x.dim() == 1 && x.size(0) == rows, what, " must have shape (", rows,
             ",), got another shape");
  std::vector<double> out(rows);
  const Dtype dtype = float_dtype(what.c_str(), x);
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t at = i * x.stride(0);
    switch (dtype) {
      case Dtype::kFloat64:
        out[i] = load(static_cast<const double*>(x.const_data_ptr()) + at);
        break;
      case Dtype::kFloat32:
        out[i] = load(static_cast<const float*>(x.const_data_ptr()) + at);
        break;
      case Dtype::kBFloat16:
        out[i] = load(static_cast<const BFloat16*>(x.const_data_ptr()) + at);
        break;
      case Dtype::kFloat16:
        out[i] = load(static_cast<const Float16*>(x.const_data_ptr()) + at);
        break;
    }
  }
  return out;
}

std::vector<FlowCoefficients> coefficients_of(const std::string& schedule, double noise_level,
                                              const Tensor& sigma, const Tensor& sigma_next,
                                              int64_t rows) {
  const Schedule kind = schedule_of(schedule, noise_level);
  const std::vector<double> now = numbers_of("sigma", sigma, rows);
  const std::vector<double> next = numbers_of("sigma_next", sigma_next, rows);
  std::vector<FlowCoefficients> out(rows);
  for (int64_t i = 0; i < rows; ++i) {
    RLIR_CHECK(now[i] > 0.0 && now[i] <= 1.0,
               "flow_sde_step: sigma must be above 0 and at most 1, got ", now[i]);
    RLIR_CHECK(next[i] >= 0.0 && next[i] < now[i],
               "flow_sde_step: sigma_next must be >= 0 and below sigma, got ", next[i], " after ",
               now[i]);
    out[i] = coefficients_of(kind, noise_level, now[i], next[i]);
  }
  return out;
}

int64_t number_of(const char* name, const Tensor& x) {
  RLIR_CHECK(x.is_cpu(), "flow_sde_step: ", name, " must be on the CPU, got another device");
  RLIR_CHECK(x.scalar_type() == ScalarType::Long && x.numel() == 1, "flow_sde_step: ", name,
             " must be one int64, got ", x.numel(), " of dtype ",
             static_cast<int>(x.scalar_type()));
  return *x.const_data_ptr<int64_t>();
}

void check_like(const char* name, const Tensor& x, const Tensor& sample) {
  RLIR_CHECK(x.is_cpu(), "flow_sde_step: ", name, " must be on the CPU, got another device");
  bool same = x.dim() == sample.dim();
  for (int64_t d = 0; same && d < x.dim(); ++d) same = x.size(d) == sample.size(d);
  RLIR_CHECK(same, "flow_sde_step: ", name, " must have the shape of sample, got another shape");
}

int64_t row_size(const Tensor& x) {
  RLIR_CHECK(x.dim() >= 1, "flow_sde_step: sample must have rows, got no dimension");
  int64_t size = 1;
  for (int64_t d = 1; d < x.dim(); ++d) size *= x.size(d);
  RLIR_CHECK(size >= 1 && size < kLargestRow,
             "flow_sde_step: sample must have 1 to 2^34 - 1 elements a row, got ", size);
  return size;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> flow_sde_step_cpu(
    const Tensor& velocity, const Tensor& sample, const Tensor& sigma, const Tensor& sigma_next,
    const std::optional<Tensor>& previous, const Tensor& seed, const Tensor& offset,
    const std::optional<Tensor>& row_ids, std::string schedule, double noise_level) {
  RLIR_CHECK(sample.is_cpu(), "flow_sde_step: sample must be on the CPU, got another device");
  check_like("velocity", velocity, sample);
  if (previous) check_like("previous", *previous, sample);
  const int64_t size = row_size(sample), rows = sample.size(0), chunks = cpu::flow_chunks(size);
  cpu::FlowSdeStep args{};
  args.velocity_dtype = float_dtype("flow_sde_step: velocity", velocity);
  args.sample_dtype = float_dtype("flow_sde_step: sample", sample);
  args.is_double = args.velocity_dtype == Dtype::kFloat64 || args.sample_dtype == Dtype::kFloat64;
  if (previous) args.previous_dtype = float_dtype("flow_sde_step: previous", *previous);
  const auto coefficients = coefficients_of(schedule, noise_level, sigma, sigma_next, rows);
  args.seed = static_cast<uint64_t>(number_of("seed", seed));
  const int64_t count = number_of("offset", offset);
  RLIR_CHECK(count >= 0 && count < (int64_t{1} << 32),
             "flow_sde_step: offset must be >= 0 and below 2^32, got ", count);
  args.offset = static_cast<uint32_t>(count);
  if (row_ids) {
    RLIR_CHECK(row_ids->is_cpu(), "flow_sde_step: row_ids must be on the CPU, got another device");
    RLIR_CHECK(row_ids->scalar_type() == ScalarType::Long,
               "flow_sde_step: row_ids must be int64, got dtype ",
               static_cast<int>(row_ids->scalar_type()));
    RLIR_CHECK(row_ids->dim() == 1 && row_ids->size(0) == rows,
               "flow_sde_step: row_ids must have shape (", rows, ",), got another shape");
    args.row_ids = row_ids->const_data_ptr<int64_t>();
    args.row_id_stride = row_ids->stride(0);
  }

  const ScalarType real = args.is_double ? ScalarType::Double : ScalarType::Float;
  Tensor next = previous ? torch::stable::new_empty(sample, {0})
                         : torch::stable::new_empty(sample, sample.sizes());
  Tensor mean = torch::stable::new_empty(sample, sample.sizes(), real);
  Tensor logprob = torch::stable::new_empty(sample, {rows}, real);
  Tensor std = torch::stable::new_empty(sample, {rows}, real);
  if (rows == 0) return {next, logprob, mean, std};
  const Tensor v = torch::stable::contiguous(velocity), x = torch::stable::contiguous(sample);
  std::optional<Tensor> kept;
  if (previous) kept = torch::stable::contiguous(*previous);
  std::vector<double> partials(rows * chunks);
  args.velocity = v.const_data_ptr();
  args.sample = x.const_data_ptr();
  args.previous = kept ? kept->const_data_ptr() : nullptr;
  args.next = previous ? nullptr : next.mutable_data_ptr();
  args.mean = mean.mutable_data_ptr();
  args.partials = partials.data();
  args.coefficients = coefficients.data();
  args.size = size;
  const auto kernel = RLIR_CPU_KERNEL(flow_sde_step);
  torch::stable::parallel_for(0, rows * chunks, kChunksPerThread,
                              [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  for (int64_t i = 0; i < rows; ++i) {
    const FlowCoefficients& k = coefficients[i];
    double squares = 0.0;
    for (int64_t c = 0; c < chunks; ++c) squares += partials[i * chunks + c];
    const double value = -k.precision * (squares / static_cast<double>(size)) - k.constant;
    if (args.is_double) {
      logprob.mutable_data_ptr<double>()[i] = value;
      std.mutable_data_ptr<double>()[i] = k.std;
    } else {
      logprob.mutable_data_ptr<float>()[i] = static_cast<float>(value);
      std.mutable_data_ptr<float>()[i] = static_cast<float>(k.std);
    }
  }
  return {next, logprob, mean, std};
}

Tensor flow_sde_step_backward_cpu(const std::optional<Tensor>& dlogprob,
                                  const std::optional<Tensor>& dmean, const Tensor& reached,
                                  const Tensor& mean, const Tensor& sigma, const Tensor& sigma_next,
                                  std::string schedule, double noise_level) {
  RLIR_CHECK(mean.is_cpu(), "flow_sde_step: mean must be on the CPU, got another device");
  check_like("previous", reached, mean);
  const int64_t size = row_size(mean), rows = mean.size(0), chunks = cpu::flow_chunks(size);
  cpu::FlowSdeBackward args{};
  const Dtype real = float_dtype("flow_sde_step: mean", mean);
  RLIR_CHECK(real == Dtype::kFloat64 || real == Dtype::kFloat32,
             "flow_sde_step: mean must be float64 or float32, got dtype ",
             static_cast<int>(mean.scalar_type()));
  args.is_double = real == Dtype::kFloat64;
  args.reached_dtype = float_dtype("flow_sde_step: previous", reached);
  const auto coefficients = coefficients_of(schedule, noise_level, sigma, sigma_next, rows);
  std::vector<double> slope(rows, 0.0);
  if (dlogprob) slope = numbers_of("d logprob", *dlogprob, rows);
  for (int64_t i = 0; i < rows; ++i) {
    slope[i] *= 2.0 * coefficients[i].precision / static_cast<double>(size);
  }
  Tensor dvelocity = torch::stable::new_empty(mean, mean.sizes());
  if (rows == 0) return dvelocity;
  const Tensor r = torch::stable::contiguous(reached), m = torch::stable::contiguous(mean);
  std::optional<Tensor> dm;
  if (dmean) {
    check_like("d mean", *dmean, mean);
    RLIR_CHECK(dmean->scalar_type() == mean.scalar_type(),
               "flow_sde_step: d mean must have the dtype of mean, got dtype ",
               static_cast<int>(dmean->scalar_type()));
    dm = torch::stable::contiguous(*dmean);
    args.dmean = dm->const_data_ptr();
  }
  args.reached = r.const_data_ptr();
  args.mean = m.const_data_ptr();
  args.slope = slope.data();
  args.coefficients = coefficients.data();
  args.dvelocity = dvelocity.mutable_data_ptr();
  args.size = size;
  const auto kernel = RLIR_CPU_KERNEL(flow_sde_backward);
  torch::stable::parallel_for(0, rows * chunks, kChunksPerThread,
                              [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  return dvelocity;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(rlir, m) {
  m.def(
      "flow_sde_step(Tensor velocity, Tensor sample, Tensor sigma, Tensor sigma_next, "
      "Tensor? previous, Tensor seed, Tensor offset, Tensor? row_ids=None, *, str schedule, "
      "float noise_level) -> (Tensor, Tensor, Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "flow_sde_step_backward(Tensor? dlogprob, Tensor? dmean, Tensor reached, Tensor mean, "
      "Tensor sigma, Tensor sigma_next, *, str schedule, float noise_level) -> Tensor",
      {at::Tag::pt2_compliant_tag});
}

STABLE_TORCH_LIBRARY_IMPL(rlir, CPU, m) {
  m.impl("flow_sde_step", TORCH_BOX(&flow_sde_step_cpu));
  m.impl("flow_sde_step_backward", TORCH_BOX(&flow_sde_step_backward_cpu));
}

}  // namespace rlir
