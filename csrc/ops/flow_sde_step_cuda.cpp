// rlir::flow_sde_step and its backward on CUDA. Nothing here waits for the device, and all memory
// comes from torch's allocator: a call can be captured in a CUDA graph.
#include "cuda/flow_sde_step.cuh"

#include <limits>
#include <tuple>

#include "ops/cuda_call.h"
#include "ops/flow_sde_step.h"

namespace rlir {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void check_grid(int64_t rows, int64_t size) {
  RLIR_CHECK(rows * cpu::flow_chunks(size) <= std::numeric_limits<int32_t>::max(),
             "flow_sde_step: sample must have below 2^31 chunks of 4096 elements, got ",
             rows * cpu::flow_chunks(size));
}

cuda::FlowNumbers numbers_of(CudaCall& call, const char* name, const Tensor& x,
                             const Tensor& like) {
  const Dtype dtype = check_flow_numbers(name, x, like);
  return {call.in(x, name), x.stride(0), dtype};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> flow_sde_step_cuda(
    const Tensor& velocity, const Tensor& sample, const Tensor& sigma, const Tensor& sigma_next,
    const std::optional<Tensor>& previous, const Tensor& seed, const Tensor& offset,
    const std::optional<Tensor>& row_ids, std::string schedule, double noise_level) {
  check_flow_shape("velocity", velocity, sample);
  if (previous) check_flow_shape("previous", *previous, sample);
  const int64_t size = flow_row_size(sample), rows = sample.size(0);
  check_grid(rows, size);
  cuda::FlowSdeStep args{};
  args.velocity_dtype = float_dtype("flow_sde_step: velocity", velocity);
  args.sample_dtype = float_dtype("flow_sde_step: sample", sample);
  args.is_double = args.velocity_dtype == Dtype::kFloat64 || args.sample_dtype == Dtype::kFloat64;
  if (previous) args.previous_dtype = float_dtype("flow_sde_step: previous", *previous);
  args.noise = flow_noise(schedule, noise_level);
  check_flow_number("seed", seed, sample);
  check_flow_number("offset", offset, sample);
  if (row_ids) check_flow_ids(*row_ids, sample);

  CudaCall call("flow_sde_step", sample);
  args.sigma = numbers_of(call, "sigma", sigma, sample);
  args.sigma_next = numbers_of(call, "sigma_next", sigma_next, sample);
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
  Tensor partials =
      torch::stable::new_empty(sample, {rows * cpu::flow_chunks(size)}, ScalarType::Double);
  args.velocity = call.in(v, "velocity");
  args.sample = call.in(x, "sample");
  args.previous = kept ? call.in(*kept, "previous") : nullptr;
  args.next = previous ? nullptr : call.out(next, "next");
  args.mean = call.out(mean, "mean");
  args.logprob = call.out(logprob, "logprob");
  args.std = call.out(std, "std");
  args.partials = static_cast<double*>(call.out(partials, "partials"));
  if (row_ids) {
    args.row_ids = static_cast<const int64_t*>(call.in(*row_ids, "row_ids"));
    args.row_id_stride = row_ids->stride(0);
  }
  args.seed = static_cast<const int64_t*>(call.in(seed, "seed"));
  args.offset = static_cast<const int64_t*>(call.in(offset, "offset"));
  args.rows = rows;
  args.size = size;
  call.check(cuda::flow_sde_step(args, call.stream()));
  return {next, logprob, mean, std};
}

Tensor flow_sde_step_backward_cuda(const std::optional<Tensor>& dlogprob,
                                   const std::optional<Tensor>& dmean, const Tensor& reached,
                                   const Tensor& mean, const Tensor& sigma,
                                   const Tensor& sigma_next, std::string schedule,
                                   double noise_level) {
  check_flow_shape("previous", reached, mean);
  cuda::FlowSdeBackward args{};
  args.rows = mean.size(0);
  args.size = flow_row_size(mean);
  check_grid(args.rows, args.size);
  args.is_double = flow_real(mean) == Dtype::kFloat64;
  args.reached_dtype = float_dtype("flow_sde_step: previous", reached);
  args.noise = flow_noise(schedule, noise_level);
  CudaCall call("flow_sde_step", mean);
  args.sigma = numbers_of(call, "sigma", sigma, mean);
  args.sigma_next = numbers_of(call, "sigma_next", sigma_next, mean);
  if (dlogprob) args.dlogprob = numbers_of(call, "d logprob", *dlogprob, mean);
  Tensor dvelocity = torch::stable::new_empty(mean, mean.sizes());
  if (args.rows == 0) return dvelocity;
  const Tensor r = torch::stable::contiguous(reached), m = torch::stable::contiguous(mean);
  std::optional<Tensor> dm;
  if (dmean) {
    check_flow_dmean(*dmean, mean);
    dm = torch::stable::contiguous(*dmean);
    args.dmean = call.in(*dm, "d mean");
  }
  args.reached = call.in(r, "previous");
  args.mean = call.in(m, "mean");
  args.dvelocity = call.out(dvelocity, "d velocity");
  call.check(cuda::flow_sde_backward(args, call.stream()));
  return dvelocity;
}

}  // namespace

RLIR_CUDA_OP("flow_sde_step", kFlowSdeStepSchema, &flow_sde_step_cuda)
RLIR_CUDA_OP("flow_sde_step_backward", kFlowSdeBackwardSchema, &flow_sde_step_backward_cuda)

}  // namespace rlir
