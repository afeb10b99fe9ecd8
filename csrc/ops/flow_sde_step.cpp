// rlir::flow_sde_step and its backward on the CPU. What the kernels compute: cpu/flow_sde_step.h.
#include "ops/flow_sde_step.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "core/cpu_isa.h"

namespace rlir {
namespace {

using cpu::FlowCoefficients;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kChunksPerThread = 4;

std::vector<double> numbers_of(const char* name, const Tensor& x, const Tensor& like) {
  const int64_t rows = like.size(0);
  const Dtype dtype = check_flow_numbers(name, x, like);
  std::vector<double> out(rows);
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
                                              const Tensor& like) {
  const cpu::FlowNoise noise = flow_noise(schedule, noise_level);
  const std::vector<double> now = numbers_of("sigma", sigma, like);
  const std::vector<double> next = numbers_of("sigma_next", sigma_next, like);
  std::vector<FlowCoefficients> out(now.size());
  for (size_t i = 0; i < now.size(); ++i) {
    RLIR_CHECK(cpu::flow_sigma_ok(now[i]),
               "flow_sde_step: sigma must be above 0 and at most 1, got ", now[i]);
    RLIR_CHECK(cpu::flow_next_ok(now[i], next[i]),
               "flow_sde_step: sigma_next must be >= 0 and below sigma, got ", next[i], " after ",
               now[i]);
    out[i] = cpu::flow_coefficients(noise, now[i], next[i]);
  }
  return out;
}

int64_t number_of(const char* name, const Tensor& x, const Tensor& like) {
  check_flow_number(name, x, like);
  return *x.const_data_ptr<int64_t>();
}

std::tuple<Tensor, Tensor, Tensor, Tensor> flow_sde_step_cpu(
    const Tensor& velocity, const Tensor& sample, const Tensor& sigma, const Tensor& sigma_next,
    const std::optional<Tensor>& previous, const Tensor& seed, const Tensor& offset,
    const std::optional<Tensor>& row_ids, std::string schedule, double noise_level) {
  RLIR_CHECK(sample.is_cpu(), "flow_sde_step: sample must be on the CPU, got another device");
  check_flow_shape("velocity", velocity, sample);
  if (previous) check_flow_shape("previous", *previous, sample);
  const int64_t size = flow_row_size(sample), rows = sample.size(0),
                chunks = cpu::flow_chunks(size);
  cpu::FlowSdeStep args{};
  args.velocity_dtype = float_dtype("flow_sde_step: velocity", velocity);
  args.sample_dtype = float_dtype("flow_sde_step: sample", sample);
  args.is_double = args.velocity_dtype == Dtype::kFloat64 || args.sample_dtype == Dtype::kFloat64;
  if (previous) args.previous_dtype = float_dtype("flow_sde_step: previous", *previous);
  const auto coefficients = coefficients_of(schedule, noise_level, sigma, sigma_next, sample);
  args.seed = static_cast<uint64_t>(number_of("seed", seed, sample));
  const int64_t count = number_of("offset", offset, sample);
  RLIR_CHECK(count >= 0 && count < (int64_t{1} << 32),
             "flow_sde_step: offset must be >= 0 and below 2^32, got ", count);
  args.offset = static_cast<uint32_t>(count);
  if (row_ids) {
    check_flow_ids(*row_ids, sample);
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
    const double value = cpu::flow_logprob(k, squares, size);
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
  check_flow_shape("previous", reached, mean);
  const int64_t size = flow_row_size(mean), rows = mean.size(0), chunks = cpu::flow_chunks(size);
  cpu::FlowSdeBackward args{};
  const Dtype real = flow_real(mean);
  args.is_double = real == Dtype::kFloat64;
  args.reached_dtype = float_dtype("flow_sde_step: previous", reached);
  const auto coefficients = coefficients_of(schedule, noise_level, sigma, sigma_next, mean);
  std::vector<double> slope(rows, 0.0);
  if (dlogprob) slope = numbers_of("d logprob", *dlogprob, mean);
  for (int64_t i = 0; i < rows; ++i) {
    slope[i] = cpu::flow_slope(coefficients[i], slope[i], size);
  }
  Tensor dvelocity = torch::stable::new_empty(mean, mean.sizes());
  if (rows == 0) return dvelocity;
  const Tensor r = torch::stable::contiguous(reached), m = torch::stable::contiguous(mean);
  std::optional<Tensor> dm;
  if (dmean) {
    check_flow_dmean(*dmean, mean);
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
  m.def(kFlowSdeStepSchema, {at::Tag::pt2_compliant_tag});
  m.def(kFlowSdeBackwardSchema, {at::Tag::pt2_compliant_tag});
}

STABLE_TORCH_LIBRARY_IMPL(rlir, CPU, m) {
  m.impl("flow_sde_step", TORCH_BOX(&flow_sde_step_cpu));
  m.impl("flow_sde_step_backward", TORCH_BOX(&flow_sde_step_backward_cpu));
}

}  // namespace rlir
