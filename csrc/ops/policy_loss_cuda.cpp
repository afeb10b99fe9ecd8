// rlir::policy_loss and its backward on CUDA. Nothing here waits for the device, and all memory
// comes from torch's allocator: a call can be captured in a CUDA graph.
#include "cuda/policy_loss.cuh"

#include <limits>
#include <tuple>

#include "ops/cuda_call.h"
#include "ops/policy_loss.h"

namespace rlir {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

cuda::PolicyNumber number_of(CudaCall& call, const char* name, const Tensor& x,
                             const Tensor& logprob) {
  check_policy_number(name, x, logprob);
  using Kind = cuda::PolicyNumber::Kind;
  const ScalarType dtype = x.scalar_type();
  RLIR_CHECK(
      dtype == ScalarType::Long || dtype == ScalarType::Int || dtype == ScalarType::Double ||
          dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
      "policy_loss: ", name, " must be an int or a float, got dtype ", static_cast<int>(dtype));
  const Kind kind = dtype == ScalarType::Long  ? Kind::kInt64
                    : dtype == ScalarType::Int ? Kind::kInt32
                                               : static_cast<Kind>(float_dtype("policy_loss", x));
  return {call.in(x, name), kind};
}

// Tells the emulator what the kernels may read.
void note_inputs(CudaCall& call, const Tensor& logprob, const Tensor& old_logprob,
                 const Tensor& advantages, const std::optional<Tensor>& ref_logprob,
                 const std::optional<Tensor>& mask, const std::optional<Tensor>& rollout_logprob) {
  call.in(logprob, "logprob");
  call.in(old_logprob, "old_logprob");
  call.in(advantages, "advantages");
  if (ref_logprob) call.in(*ref_logprob, "ref_logprob");
  if (mask) call.in(*mask, "mask");
  if (rollout_logprob) call.in(*rollout_logprob, "rollout_logprob");
}

// Blocks and, with room for a round of them, columns are counted in 32 bits.
void check_grid(int64_t blocks, int64_t columns) {
  RLIR_CHECK(columns < int64_t{1} << 30, "policy_loss: logprob must have below 2^30 columns, got ",
             columns);
  RLIR_CHECK(blocks <= std::numeric_limits<int32_t>::max(),
             "policy_loss: logprob must have below 2^31 rows of 1024 tokens, got ", blocks);
}

std::tuple<Tensor, Tensor, Tensor> policy_loss_cuda(
    const Tensor& logprob, const Tensor& old_logprob, const Tensor& advantages,
    const std::optional<Tensor>& ref_logprob, const std::optional<Tensor>& mask,
    const std::optional<Tensor>& rollout_logprob, const std::optional<Tensor>& normalizer,
    std::string loss_type, std::string importance_level, double clip_low, double clip_high,
    std::optional<double> delta, double kl_weight, std::string kl_estimator, bool kl_importance,
    std::optional<double> truncated_importance, std::optional<double> divisor,
    std::optional<int64_t> max_length) {
  cuda::PolicyLossForward args{};
  args.f = policy_arguments(logprob, old_logprob, advantages, ref_logprob, mask, rollout_logprob,
                            loss_type, importance_level, clip_low, clip_high, delta, kl_weight,
                            kl_estimator, kl_importance, truncated_importance);
  args.given = policy_divisor(args.f, divisor, max_length);
  check_grid(args.f.rows, args.f.columns);
  CudaCall call("policy_loss", logprob);
  note_inputs(call, logprob, old_logprob, advantages, ref_logprob, mask, rollout_logprob);
  if (normalizer) {
    const auto number = number_of(call, "normalizer", *normalizer, logprob);
    if (args.f.division == cpu::PolicyLossDivision::kNormalizer) args.normalizer = number;
  }
  const ScalarType real = args.f.float64 ? ScalarType::Double : ScalarType::Float;
  Tensor loss = torch::stable::new_empty(logprob, {}, real);
  Tensor statistics = torch::stable::new_empty(logprob, {cpu::kPolicyLossStatistics}, real);
  Tensor scales = torch::stable::new_empty(logprob, {3, args.f.rows}, ScalarType::Double);
  constexpr int64_t kValues = sizeof(cpu::PolicyLossRow) / sizeof(double);
  Tensor rows = torch::stable::new_empty(logprob, {args.f.rows, kValues}, ScalarType::Double);
  args.loss = call.out(loss, "loss");
  args.statistics = call.out(statistics, "statistics");
  args.scales = static_cast<double*>(call.out(scales, "scales"));
  args.rows = static_cast<cpu::PolicyLossRow*>(call.out(rows, "row sums"));
  call.check(cuda::policy_loss(args, call.stream()));
  return {loss, statistics, scales};
}

Tensor policy_loss_backward_cuda(const Tensor& grad, const Tensor& scales, const Tensor& logprob,
                                 const Tensor& old_logprob, const Tensor& advantages,
                                 const std::optional<Tensor>& ref_logprob,
                                 const std::optional<Tensor>& mask,
                                 const std::optional<Tensor>& rollout_logprob,
                                 std::string loss_type, std::string importance_level,
                                 double clip_low, double clip_high, std::optional<double> delta,
                                 double kl_weight, std::string kl_estimator, bool kl_importance,
                                 std::optional<double> truncated_importance) {
  cuda::PolicyLossBackward args{};
  args.f = policy_arguments(logprob, old_logprob, advantages, ref_logprob, mask, rollout_logprob,
                            loss_type, importance_level, clip_low, clip_high, delta, kl_weight,
                            kl_estimator, kl_importance, truncated_importance);
  check_policy_scales(scales, args.f, logprob);
  check_grid(args.f.rows * ((args.f.columns + 1023) / 1024), args.f.columns);
  CudaCall call("policy_loss", logprob);
  args.grad = number_of(call, "grad", grad, logprob);
  Tensor gradient = torch::stable::new_empty(logprob, logprob.sizes());
  if (logprob.numel() == 0) return gradient;
  note_inputs(call, logprob, old_logprob, advantages, ref_logprob, mask, rollout_logprob);
  args.scales = static_cast<const double*>(call.in(scales, "scales"));
  args.gradient = call.out(gradient, "gradient");
  call.check(cuda::policy_loss_backward(args, call.stream()));
  return gradient;
}

}  // namespace

RLIR_CUDA_OP("policy_loss", kPolicyLossSchema, &policy_loss_cuda)
RLIR_CUDA_OP("policy_loss_backward", kPolicyLossBackwardSchema, &policy_loss_backward_cuda)

}  // namespace rlir
