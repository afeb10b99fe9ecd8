// Why it looks like this: a team of 16 lanes takes a group, because the CPU kernel sums in 16
// accumulators. Lane i is accumulator i, and the accumulators fold by xor shuffles over 8, 4, 2, 1,
// which is the CPU's tree: the bits agree. Rewards that take no part leave no gap in that order: a
// ballot gives each reward its rank, and a shuffle brings it to the lane of its accumulator. So a
// group needs no scratch memory, whatever its size.
//
// Groups of equal size whose rows lie side by side, the common case, come through shared memory in
// 16 byte copies and leave in 16 byte stores. All others are read where they are. All arithmetic is
// float64 and none of it may be contracted: a GRPO step has a few thousand rewards.
#include "cuda/group_advantage.cuh"

#include "cuda/ptx.cuh"

namespace rlir::cuda {
namespace {

using cpu::AdvantageScale;

constexpr int kTeam = 16, kThreads = 128, kTeams = kThreads / kTeam;
constexpr int64_t kTileBytes = 16 * 1024;
static_assert(kTeam == cpu::kGroupAdvantageLanes);

struct Team {
  uint32_t mask;  // its lanes of the warp
  int lane;       // of the team
};

__device__ __forceinline__ Team this_team() {
  const int half = threadIdx.x & 16;
  return {0xffffu << half, static_cast<int>(threadIdx.x & 15)};
}

__device__ __forceinline__ double fold_sum(const Team& team, double x) {
#pragma unroll
  for (int distance = kTeam / 2; distance > 0; distance /= 2) {
    x = x + __shfl_xor_sync(team.mask, x, distance, kTeam);
  }
  return x;
}
__device__ __forceinline__ double fold_min(const Team& team, double x) {
#pragma unroll
  for (int distance = kTeam / 2; distance > 0; distance /= 2) {
    x = fmin(x, __shfl_xor_sync(team.mask, x, distance, kTeam));
  }
  return x;
}

// Position of the set bit of rank `rank` in 16 bits; there are more than `rank`.
__device__ __forceinline__ int nth_bit(uint32_t bits, int rank) {
  int at = 0;
#pragma unroll
  for (int width = 8; width > 0; width /= 2) {
    const int below = __popc((bits >> at) & ((1u << width) - 1u));
    if (rank >= below) {
      rank -= below;
      at += width;
    }
  }
  return at;
}

// Where the rewards of a group are. `read` gives row j and whether it counts.
template <typename T>
struct Rewards {
  const T* rewards;
  const bool* mask;
  const int64_t* order;  // or null
  int64_t reward_stride, mask_stride;
  int64_t size;

  __device__ bool read(int64_t j, double* value) const {
    if (j >= size) return false;
    const int64_t at = order == nullptr ? j : order[j];
    *value = load(rewards + at * reward_stride);
    return *value - *value == 0.0 && (mask == nullptr || mask[at * mask_stride]);
  }
};

// All rows of the batch in their order, for groups that do not lie evenly.
template <typename T>
struct BatchRewards {
  const GroupAdvantage& a;
  int64_t size;

  __device__ bool read(int64_t row, double* value) const {
    if (row >= size) return false;
    const int64_t group = row / a.group_size, j = row - group * a.group_size;
    const T* rewards = static_cast<const T*>(a.rewards);
    *value = load(rewards + group * a.reward_group_stride + j * a.reward_stride);
    return *value - *value == 0.0 &&
           (a.mask == nullptr || a.mask[group * a.mask_group_stride + j * a.mask_stride]);
  }
};

// Calls use(value) for each reward that counts, in the lane of its accumulator; returns how many
// there are. Two steps are read at a time, so that their loads overlap.
template <typename Source, typename Use>
__device__ __forceinline__ int64_t for_each(const Team& team, const Source& source, Use use) {
  constexpr int kSteps = 2;
  int64_t count = 0;
  for (int64_t begin = 0; begin < source.size; begin += kSteps * kTeam) {
    double value[kSteps] = {};
    bool counts[kSteps];
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      counts[i] = source.read(begin + i * kTeam + team.lane, &value[i]);
    }
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      const uint32_t ballot = __ballot_sync(team.mask, counts[i]);
      const uint32_t here = (team.mask & 1u) != 0 ? ballot & 0xffffu : ballot >> 16;
      const int found = __popc(here);
      const int rank = (team.lane - static_cast<int>(count)) & (kTeam - 1);
      double x = value[i];
      if (here != 0xffffu || (count & (kTeam - 1)) != 0) {  // the same in all lanes of a team
        x = __shfl_sync(team.mask, x, nth_bit(here, rank), kTeam);
      }
      if (rank < found) use(x);
      count += found;
    }
  }
  return count;
}

struct Moments {
  int64_t count;
  double mean, correction, deviation;
  bool spread;  // not all rewards are equal
};

// The corrected two-pass algorithm of the CPU kernel: the mean, the mean of the deviations, which
// is the rounding error of the first, the sum of squares. One loop, so that the code is there once.
template <typename Source>
__device__ __forceinline__ Moments moments_of(const Team& team, const Source& source,
                                              bool unbiased) {
  Moments m{};
  double low = INFINITY, high = INFINITY;  // high: the lowest negated reward
#pragma unroll 1
  for (int pass = 0; pass < 3; ++pass) {
    double sum = 0.0;
    m.count = for_each(team, source, [&](double x) {
      const double d = (x - m.mean) - m.correction;
      sum += pass == 2 ? __dmul_rn(d, d) : d;
      low = fmin(low, x);
      high = fmin(high, -x);
    });
    sum = fold_sum(team, sum);
    if (pass == 0) m.mean = sum / static_cast<double>(m.count);
    if (pass == 1) m.correction = sum / static_cast<double>(m.count);
    const int64_t freedom = m.count - (unbiased ? 1 : 0);
    if (pass == 2 && freedom > 0) m.deviation = sqrt(sum / static_cast<double>(freedom));
  }
  m.spread = fold_min(team, low) < -fold_min(team, high);
  return m;
}

// What turns the rewards of a group into advantages.
struct Advantage {
  double mean, correction, factor, divisor, clip;
  bool zero;

  __device__ Advantage(const GroupAdvantage& a, const Moments& m)
      : mean(m.mean), correction(m.correction), clip(a.clip) {
    const double deviation = a.scale == AdvantageScale::kBatch ? *a.batch_deviation : m.deviation;
    const double count = static_cast<double>(m.count);
    factor = a.leave_one_out ? count / static_cast<double>(m.count - 1) : 1.0;
    divisor = a.scale == AdvantageScale::kNone ? 1.0 : deviation + a.eps;
    zero = !m.spread || !(divisor > 0.0);
  }
  __device__ double of(double reward) const {
    if (zero) return 0.0;
    const double x = ((reward - mean) - correction) * factor / divisor;
    const double low = x < -clip ? -clip : x;
    return low > clip ? clip : low;
  }
};

// --- Groups anywhere in memory: a team per group, or per row where only its first row works
// --------

template <typename T>
__global__ void __launch_bounds__(kThreads) scattered_kernel(GroupAdvantage a) {
  const Team team = this_team();
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kTeams + threadIdx.x / kTeam;
  Rewards<T> source{static_cast<const T*>(a.rewards),
                    a.mask,
                    nullptr,
                    a.reward_stride,
                    a.mask_stride,
                    a.group_size};
  T* advantages = static_cast<T*>(a.advantages);
  bool known = true;
  if (a.ids == nullptr) {
    if (index >= a.rows / a.group_size) return;
    source.rewards += index * a.reward_group_stride;
    if (a.mask != nullptr) source.mask += index * a.mask_group_stride;
    advantages += index * a.group_size;
  } else {
    if (index >= a.rows) return;
    const int64_t id = a.ids[index];
    if (index > 0 && a.ids[index - 1] == id) return;
    int64_t first = index + 1, last = a.rows;  // the end of the run is in [first, last]
    while (first < last) {
      const int64_t middle = first + (last - first) / 2;
      if (a.ids[middle] == id) {
        first = middle + 1;
      } else {
        last = middle;
      }
    }
    source.size = first - index;
    source.order = a.order + index;
    known = id >= 0;
  }
  const Moments moments = moments_of(team, source, a.unbiased);
  const Advantage advantage(a, moments);
  for (int64_t j = team.lane; j < source.size; j += kTeam) {
    double reward;
    const bool counts = source.read(j, &reward);
    const int64_t row = source.order == nullptr ? j : source.order[j];
    store(advantages + row, !known ? NAN : counts ? advantage.of(reward) : 0.0);
  }
  RLIR_DEVICE_ASSERT(known, "group_advantage: group_ids must be >= 0");
}

// --- Groups side by side: kTeams of them through shared memory
// -------------------------------------

template <typename T>
__global__ void __launch_bounds__(kThreads) tile_kernel(GroupAdvantage a) {
  RLIR_SHARED_DYNAMIC(T, tile);
  const Team team = this_team();
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * kTeams * a.group_size;
  const int64_t rows = min(static_cast<int64_t>(kTeams) * a.group_size, a.rows - first_row);
  const uint32_t bytes = static_cast<uint32_t>(rows * sizeof(T));

  const char* from = reinterpret_cast<const char*>(static_cast<const T*>(a.rewards) + first_row);
  for (uint32_t at = threadIdx.x * 16; at < bytes; at += kThreads * 16) {
#if defined(RLIR_FAULT_TAIL)
    const uint32_t here = 16;
#else
    const uint32_t here = min(16u, bytes - at);
#endif
    ptx::cp_async_16(ptx::shared_address(tile) + at, from + at, here);
  }
  ptx::cp_async_commit();
#if defined(RLIR_FAULT_WAIT)
  ptx::cp_async_wait<1>();
#else
  ptx::cp_async_wait<0>();
#endif
#if !defined(RLIR_FAULT_BARRIER)
  __syncthreads();
#endif

  // Each lane reads and later overwrites the same rows of the tile: no barrier in between.
  const int64_t group = threadIdx.x / kTeam;
  if (group * a.group_size < rows) {
    const int64_t row = first_row + group * a.group_size;
    T* own = tile + group * a.group_size;
    const Rewards<T> source{own,         a.mask == nullptr ? nullptr : a.mask + row, nullptr, 1, 1,
                            a.group_size};
    const Moments moments = moments_of(team, source, a.unbiased);
    const Advantage advantage(a, moments);
    for (int64_t j = team.lane; j < a.group_size; j += kTeam) {
      double reward;
      const bool counts = source.read(j, &reward);
      store(own + j, counts ? advantage.of(reward) : 0.0);
    }
  }
  __syncthreads();

  char* to = reinterpret_cast<char*>(static_cast<T*>(a.advantages) + first_row);
  for (uint32_t at = threadIdx.x * 16; at + 16 <= bytes; at += kThreads * 16) {
    *reinterpret_cast<uint4*>(to + at) =
        *reinterpret_cast<const uint4*>(reinterpret_cast<const char*>(tile) + at);
  }
  const int64_t whole = bytes / 16 * 16 / sizeof(T);
  if (whole + threadIdx.x < rows) {  // fewer than 16 bytes are left
    static_cast<T*>(a.advantages)[first_row + whole + threadIdx.x] = tile[whole + threadIdx.x];
  }
}

// One team: the sum must not depend on how many there are.
template <typename T>
__global__ void __launch_bounds__(kTeam) batch_kernel(GroupAdvantage a) {
  const Team team = this_team();
  const Moments moments = moments_of(team, BatchRewards<T>{a, a.rows}, a.unbiased);
  if (team.lane == 0) *a.batch_deviation = moments.deviation;
}

bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

template <typename T>
int run(const GroupAdvantage& a, void* stream) {
  if (a.scale == AdvantageScale::kBatch) {
    const int error = launch(batch_kernel<T>, dim3(1), dim3(kTeam), 0, stream, a);
    if (error != 0) return error;
  }
  const int64_t tile = kTeams * a.group_size * static_cast<int64_t>(sizeof(T));
  const bool side_by_side =
      a.ids == nullptr && a.reward_stride == 1 && a.reward_group_stride == a.group_size &&
      (a.mask == nullptr || (a.mask_stride == 1 && a.mask_group_stride == a.group_size));
  const int64_t teams = a.ids != nullptr ? a.rows : a.rows / a.group_size;
  const dim3 grid(static_cast<unsigned>(ceil_div<int64_t>(teams, kTeams)));
  if (side_by_side && tile <= kTileBytes && aligned(a.rewards) && aligned(a.advantages)) {
    const size_t shared = static_cast<size_t>(ceil_div<int64_t>(tile, 16) * 16);
    return launch(tile_kernel<T>, grid, dim3(kThreads), shared, stream, a);
  }
  return launch(scattered_kernel<T>, grid, dim3(kThreads), 0, stream, a);
}

}  // namespace

int group_advantage(const GroupAdvantage& a, void* stream) {
  switch (a.dtype) {
    case Dtype::kFloat64:
      return run<double>(a, stream);
    case Dtype::kFloat32:
      return run<float>(a, stream);
    case Dtype::kBFloat16:
      return run<BFloat16>(a, stream);
    case Dtype::kFloat16:
      return run<Float16>(a, stream);
  }
  return 1;
}

}  // namespace rlir::cuda
