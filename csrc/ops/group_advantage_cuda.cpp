// rlir::group_advantage on CUDA. Nothing here waits for the device, and all memory comes from
// torch's allocator: a call can be captured in a CUDA graph.
#include "cuda/group_advantage.cuh"

#include <array>

#include "ops/cuda_call.h"
#include "ops/group_advantage.h"

namespace rlir {
namespace {

using torch::stable::Tensor;

struct Sorted {
  Tensor ids, order;
};

// torch's sort: it stays on the device, and rows of a group keep their order.
Sorted sort_stable(const Tensor& ids) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  std::array<StableIValue, 4> stack{from(ids), from(std::optional<bool>(true)), from(int64_t{0}),
                                    from(false)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
  return {to<Tensor>(stack[0]), to<Tensor>(stack[1])};
}

Tensor group_advantage_cuda(const Tensor& rewards, const std::optional<Tensor>& group_ids,
                            const std::optional<Tensor>& mask, std::optional<int64_t> group_size,
                            std::string scale, std::string baseline, double eps,
                            std::optional<double> clip, bool unbiased) {
  auto args = group_advantage_arguments<cuda::GroupAdvantage>(rewards, group_ids, mask, group_size,
                                                              scale, baseline, eps, clip, unbiased);
  args.rows = rewards.numel();
  CudaCall call("group_advantage", rewards);
  Tensor advantages = torch::stable::new_empty(rewards, rewards.sizes());
  if (args.rows == 0) return advantages;
  args.rewards = call.in(rewards, "rewards");
  args.advantages = call.out(advantages, "advantages");
  if (mask) args.mask = static_cast<const bool*>(call.in(*mask, "mask"));

  std::optional<Sorted> sorted;
  if (group_ids) {
    sorted = sort_stable(*group_ids);
    args.ids = static_cast<const int64_t*>(call.in(sorted->ids, "sorted ids"));
    args.order = static_cast<const int64_t*>(call.in(sorted->order, "order"));
    // The batch as one group of rows side by side.
    args.group_size = args.rows;
    args.reward_group_stride = args.mask_group_stride = 0;
  }
  std::optional<Tensor> deviation;
  if (args.scale == cpu::AdvantageScale::kBatch) {
    constexpr std::array<int64_t, 1> kOne{1};
    deviation =
        torch::stable::new_empty(rewards, {kOne.data(), 1}, torch::headeronly::ScalarType::Double);
    args.batch_deviation = static_cast<double*>(call.out(*deviation, "batch deviation"));
  }
  call.check(cuda::group_advantage(args, call.stream()));
  return advantages;
}

}  // namespace

RLIR_CUDA_OP("group_advantage", kGroupAdvantageSchema, &group_advantage_cuda)

}  // namespace rlir
