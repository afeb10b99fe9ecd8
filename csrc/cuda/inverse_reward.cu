// Why it looks like this: a block takes a trajectory and a warp a frame, read as in
// read_action.cuh, so that a lane has the class of one or two factors, compares it with the command
// and counts its matches in a register. Counts are integers, so that no order of summation can
// show; one thread makes the weighted sum, in the CPU's order.
#include "cuda/inverse_reward.cuh"

#include "cuda/read_action.cuh"

namespace rlir::cuda {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / 32;

// The head's class that a command in degrees asks for, or -1 for NaN: as on the CPU.
__device__ __forceinline__ int bin_of(double degrees, const double* edges, int size) {
  if (degrees != degrees) return -1;
  const int half = (size - 1) / 2;
  int bin = half;
  for (int i = 0; i < half; ++i) {
    bin += (degrees >= edges[i] ? 1 : 0) - (degrees <= -edges[i] ? 1 : 0);
  }
  return bin;
}

// The class that the command of a factor asks for, or -1 if there is none.
__device__ __forceinline__ int wanted_class(const InverseReward& a, int64_t trajectory,
                                            int64_t frame, int f) {
  if (a.degrees != nullptr && f < a.heads.axes) {
    const float x = a.degrees[trajectory * a.degree_strides[0] + frame * a.degree_strides[1] +
                              f * a.degree_strides[2]];
    return bin_of(x, a.edges + a.edge_offsets[f], a.heads.sizes[f]);
  }
  const int64_t command = a.actions[trajectory * a.action_strides[0] + frame * a.action_strides[1] +
                                    f * a.action_strides[2]];
  if (command < 0 || command >= a.command_sizes[f]) return -1;
  return a.command_classes[a.command_offsets[f] + command];
}

// What a warp has counted. `matches`: of factor `lane` and lane + 32, one after another.
struct Counts {
  int32_t matches[kMaxFactors];
  int32_t frames, joint;
  bool unreadable, bad;
};

template <typename Real>
__global__ void __launch_bounds__(kThreads, 6)
    reward_kernel(const RLIR_GRID_CONSTANT InverseReward a) {
  RLIR_SHARED(ButtonTables, tables, 1);
  RLIR_SHARED(Counts, counts, kWarps);
  copy_tables(a.heads, tables);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int factors = a.heads.axes + a.heads.groups;
  const int64_t trajectory = blockIdx.x;
  int matched[2] = {0, 0}, frames = 0, joint = 0;
  bool unreadable = false, bad = false;
  for (int64_t frame = warp; frame < a.frames; frame += kWarps) {
    float* out = a.matches + (trajectory * a.frames + frame) * factors;
    const bool here =
        a.mask == nullptr || a.mask[trajectory * a.mask_strides[0] + frame * a.mask_strides[1]];
    if (!here) {  // nor are its commands looked at
      for (int f = lane; f < factors; f += 32) out[f] = 0.0f;
      continue;
    }
    ++frames;
    const Classes mine = read_frame<Real>(a.heads, *tables, trajectory, frame, lane);
    bool missed = false;
#pragma unroll
    for (int slot = 0; slot < 2; ++slot) {
      const int f = lane + 32 * slot;
      if (f >= factors) continue;
      const int found = slot == 0 ? mine.first : mine.second;
      const int wanted = wanted_class(a, trajectory, frame, f);
      const bool match = found >= 0 && found == wanted;
      unreadable = unreadable || found < 0;
      bad = bad || wanted < 0;
      missed = missed || (a.weights[f] > 0.0 && !match);
      matched[slot] += match ? 1 : 0;
      out[f] = found < 0 || wanted < 0 ? NAN : match ? 1.0f : 0.0f;
    }
    joint += __any_sync(kAllLanes, missed) ? 0 : 1;
  }
  unreadable = __any_sync(kAllLanes, unreadable);
  bad = __any_sync(kAllLanes, bad);
  counts[warp].matches[lane] = matched[0];
  counts[warp].matches[lane + 32] = matched[1];
  if (lane == 0) {
    counts[warp].frames = frames;
    counts[warp].joint = joint;
    counts[warp].unreadable = unreadable;
    counts[warp].bad = bad;
  }
#if !defined(RLIR_FAULT_BARRIER)
  __syncthreads();
#endif
  if (threadIdx.x != 0) return;
  frames = joint = 0;
  unreadable = bad = false;
  for (int w = 0; w < kWarps; ++w) {
    frames += counts[w].frames;
    joint += counts[w].joint;
    unreadable = unreadable || counts[w].unreadable;
    bad = bad || counts[w].bad;
  }
  double sum = static_cast<double>(joint), weight = 1.0;
  if (!a.joint) {
    sum = 0.0;
    for (int f = 0; f < factors; ++f) {
      int count = 0;
      for (int w = 0; w < kWarps; ++w) count += counts[w].matches[f];
      sum += a.weights[f] * static_cast<double>(count);
    }
    weight = a.total_weight;
  }
  const bool known = !unreadable && !bad && frames > 0;
  a.reward[trajectory] =
      known ? static_cast<float>(sum / (weight * static_cast<double>(frames))) : NAN;
  RLIR_DEVICE_ASSERT(!bad,
                     "inverse_reward: actions must be classes of their factor and degrees "
                     "not NaN");
}

}  // namespace

int inverse_reward(const InverseReward& a, void* stream) {
  const dim3 grid(static_cast<unsigned>(a.trajectories));
  const bool wide =
      a.heads.keys.dtype == Dtype::kFloat64 || a.heads.camera.dtype == Dtype::kFloat64;
  return wide ? launch(reward_kernel<double>, grid, dim3(kThreads), 0, stream, a)
              : launch(reward_kernel<float>, grid, dim3(kThreads), 0, stream, a);
}

}  // namespace rlir::cuda
