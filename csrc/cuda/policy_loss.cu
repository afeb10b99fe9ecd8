// Why it looks like this: a block takes a row, and loss and statistics come from one pass over it.
// A team of 16 threads takes 256 tokens, because the CPU kernel sums those in 16 accumulators
// before it goes on in double: thread i is accumulator i. It needs tokens i, i + 16, ..., but reads
// 4 i to 4 i + 3 of every 64, in one access; they change hands in shared memory. Then thread
// (value, i) adds what the teams have of a value in accumulator i, team by team, and the
// accumulators fold in the CPU's tree: the bits agree, and no sum depends on the order of threads.
//
// At sequence level the ratio belongs to the row, so its block reads logprob and old_logprob once
// before. A second kernel, one block, adds the rows in order. With a few long rows most of a GPU is
// idle: GRPO has many rows, and more blocks a row would write their sums to memory and read them.
//
// This file is longer than most: forward and backward share how tokens are read.
#include "cuda/policy_loss.cuh"

#include "cpu/policy_loss_token.h"
#include "cuda/four.cuh"

namespace rlir::cuda {
namespace {

using cpu::kRowValues;
using cpu::PolicyLoss;
using cpu::PolicyLossRow;

constexpr int kThreads = 256, kLanes = 16, kTeams = kThreads / kLanes;
constexpr int kBlock = 256;  // tokens that an accumulator sums in float, as on the CPU
constexpr int kTile = 4 * kLanes;
constexpr int kMatrices = 5, kSums = 16;
static_assert(kSums * kLanes == kThreads);
// What a thread sums of the tokens: the values of a row up to its slope, and whether a ratio is
// NaN.
constexpr int kBroken = cpu::kRowSlope + 1;
static_assert(kBroken + 1 == kSums);

// Tokens of a team on their way from the threads that read them to those that add them. The two
// teams of a warp lie in different banks.
template <typename T>
struct Tile {
  T value[kMatrices][kTile];
  uint8_t mask[kTile];
};
static_assert(sizeof(Tile<float>) / 4 % 32 == 16 && sizeof(Tile<double>) / 4 % 32 == 16);

template <typename T>
struct Shared {
  union {
    Tile<T> tiles[kTeams];
    T partial[kTeams][kSums][kLanes];
  };
  double total[kThreads];  // here rather than in registers that the tokens need
  double row[kSums];
};

// Elements column .. column + 3 of a row as T; those from the n-th on are 0. kWide: n is 4 or 0,
// and the matrix lies so that four can be read at a time.
template <bool kWide, typename T>
__device__ __forceinline__ void load_tokens(const PolicyLoss::Matrix& m, int64_t row,
                                            int64_t column, int n, T (&out)[4]) {
  const int64_t at = row * m.row_stride + column * m.stride;
  if (m.stride == 1) return load4<kWide>(m.data, m.dtype, at, n, out);
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    T one[4] = {};
    if (c == 0 || m.stride != 0) load4<false>(m.data, m.dtype, at + c * m.stride, c < n, one);
    out[c] = c == 0 || m.stride != 0 ? one[0] : out[0];
  }
}

template <bool kWide>
__device__ __forceinline__ uint32_t load_mask(const PolicyLoss& f, int64_t row, int64_t column,
                                              int n) {
  if (f.mask == nullptr) return n == 4 ? 0x01010101u : ((1u << 8 * n) - 1u) & 0x01010101u;
  const bool* from = f.mask + row * f.mask_row_stride + column * f.mask_stride;
  if constexpr (kWide) {
    return n == 0 ? 0 : *reinterpret_cast<const uint32_t*>(from);
  } else {
    uint32_t bytes = 0;
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      if (c < n && from[c * f.mask_stride]) bytes |= 1u << 8 * c;
    }
    return bytes;
  }
}

__device__ __forceinline__ int tokens_from(const PolicyLoss& f, int64_t column) {
  const int64_t rest = f.columns - column;
  return rest < 0 ? 0 : rest < 4 ? static_cast<int>(rest) : 4;
}

template <bool kWide, typename T>
__device__ __forceinline__ void stage(const PolicyLoss& f, int64_t row, int64_t begin, int lane,
                                      bool ratio_only, Tile<T>* tile) {
  const int64_t column = begin + 4 * lane;
  const int n = tokens_from(f, column);
  const auto put = [&](int i, const PolicyLoss::Matrix& m) {
    if (m.data == nullptr) return;
    T x[4];
    load_tokens<kWide>(m, row, column, n, x);
    T* to = tile->value[i] + 4 * lane;
    if constexpr (sizeof(T) == 4) {
      *reinterpret_cast<float4*>(to) = make_float4(x[0], x[1], x[2], x[3]);
    } else {
      reinterpret_cast<double2*>(to)[0] = make_double2(x[0], x[1]);
      reinterpret_cast<double2*>(to)[1] = make_double2(x[2], x[3]);
    }
  };
  *reinterpret_cast<uint32_t*>(tile->mask + 4 * lane) = load_mask<kWide>(f, row, column, n);
  put(0, f.logprob);
  put(1, f.old_logprob);
  if (ratio_only) return;
  put(2, f.advantages);
  put(3, f.ref_logprob);
  put(4, f.rollout_logprob);
}

// Of a token's terms, what they add to a thread's sums. `shared`: the ratio of the row, at sequence
// level.
template <typename T>
__device__ __forceinline__ void add_token(const PolicyLoss& f, const cpu::Token<T>& token,
                                          const Tile<T>& tile, int i, T shared, T (&sum)[kSums]) {
  const T p = tile.value[0][i], o = tile.value[1][i], a = tile.value[2][i], l = p - o;
  const T c = f.sequence ? shared : exp_of<T>(l).exp;
  T gain = token.gain(c, a, p), v = T(1);
  if (f.rollout_logprob.data != nullptr) {
    typename Simd<T>::Int cut;
    v = token.importance(o, tile.value[4][i], &cut);
    gain = a == T(0) ? T(0) : gain * v;
    sum[cpu::kRowWeight] += v;
    sum[cpu::kRowTruncated] += cut ? T(1) : T(0);
  }
  sum[cpu::kRowGain] += gain;
  if (f.ref_logprob.data != nullptr) {
    T kl = token.kl(p, tile.value[3][i]);
    if (f.kl_importance) kl = kl * c;
    sum[cpu::kRowKl] += kl;
  }
  sum[cpu::kRowTokens] += T(1);
  sum[cpu::kRowLogRatio] += l;
  const bool below = c<token.low, above = c> token.high;
  sum[cpu::kRowClippedLow] += below && a < T(0) ? T(1) : T(0);
  sum[cpu::kRowClippedHigh] += above && a > T(0) ? T(1) : T(0);
  sum[cpu::kRowClippedDelta] += c > token.delta && a < T(0) ? T(1) : T(0);
  sum[cpu::kRowOutside] += below || above ? T(1) : T(0);
  if (f.sequence) {
    if (!f.cispo && a != T(0)) sum[cpu::kRowSlope] += token.slope(c, a) * v;
    return;
  }
  sum[cpu::kRowRatio] += c;
  sum[cpu::kRowSquare] += c * c;
  sum[cpu::kRowLowest] = c < sum[cpu::kRowLowest] ? c : sum[cpu::kRowLowest];
  sum[cpu::kRowHighest] = c > sum[cpu::kRowHighest] ? c : sum[cpu::kRowHighest];
  if (c != c) sum[kBroken] = T(1);
}

// Sums over the row's tokens, into shared->row; `ratio_only`: of them, the number of tokens and the
// sum of their log-ratios.
template <bool kWide, typename T>
__device__ __forceinline__ void sum_row(const PolicyLoss& f, const cpu::Token<T>& token,
                                        int64_t row, T ratio, bool ratio_only, Shared<T>* shared) {
  const int team = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  const int columns = static_cast<int>(f.columns), blocks = (columns + kBlock - 1) / kBlock;
  // Of accumulator `lane`, this thread has value `team`.
  shared->total[threadIdx.x] = cpu::first_total(team);
#pragma unroll 1
  for (int first = 0; first < blocks; first += kTeams) {
    T sum[kSums] = {};
    sum[cpu::kRowLowest] = T(INFINITY);
    sum[cpu::kRowHighest] = -T(INFINITY);
    Tile<T>* tile = shared->tiles + team;
    const int begin = (first + team) * kBlock;
    const int end = min(begin + kBlock, columns);
#pragma unroll 1
    for (int at = begin; at < end; at += kTile) {
      stage<kWide>(f, row, at, lane, ratio_only, tile);
#if !defined(RLIR_FAULT_WARP)
      __syncwarp(0xffffu << (threadIdx.x & 16));
#endif
#pragma unroll
      for (int k = 0; k < kTile; k += kLanes) {
        if (tile->mask[k + lane] == 0) continue;
        if (ratio_only) {
          sum[cpu::kRowTokens] += T(1);
          sum[cpu::kRowLogRatio] += tile->value[0][k + lane] - tile->value[1][k + lane];
        } else {
          add_token(f, token, *tile, k + lane, ratio, sum);
        }
      }
      __syncwarp(0xffffu << (threadIdx.x & 16));  // all have read before the next tile comes
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kSums; ++i) shared->partial[team][i][lane] = sum[i];
#if !defined(RLIR_FAULT_BARRIER)
    __syncthreads();
#endif
    double total = shared->total[threadIdx.x];
    for (int t = 0; t < kTeams && t < blocks - first; ++t) {
      total = cpu::join_total(team, total, static_cast<double>(shared->partial[t][team][lane]));
    }
    shared->total[threadIdx.x] = total;
    __syncthreads();
  }
  double total = shared->total[threadIdx.x];
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) {
    const double other = __shfl_xor_sync(0xffffffffu, total, distance, kLanes);
    total = cpu::join_total(team, total, other);
  }
  if (lane == 0) shared->row[team] = total;
  __syncthreads();
}

template <typename T, bool kWide>
__global__ void __launch_bounds__(kThreads, 2)
    row_kernel(const RLIR_GRID_CONSTANT PolicyLossForward a,
               const RLIR_GRID_CONSTANT cpu::Token<T> token) {
  RLIR_SHARED(Shared<T>, shared, 1);
  const int64_t row = blockIdx.x;
  T ratio = T(0);
  if (a.f.sequence) {
    sum_row<kWide>(a.f, token, row, T(0), true, shared);
    const double n = cpu::at_least_one(shared->row[cpu::kRowTokens]);
    ratio = exp_of<T>(static_cast<T>(shared->row[cpu::kRowLogRatio] / n)).exp;
    __syncthreads();
  }
  sum_row<kWide>(a.f, token, row, ratio, false, shared);
  if (threadIdx.x != 0) return;
  const double* sum = shared->row;
  PolicyLossRow out;
  out.tokens = sum[cpu::kRowTokens];
  out.gain = sum[cpu::kRowGain];
  out.kl = sum[cpu::kRowKl];
  out.log_ratio = sum[cpu::kRowLogRatio];
  out.weight = sum[cpu::kRowWeight];
  out.truncated = sum[cpu::kRowTruncated];
  out.ratio = sum[cpu::kRowRatio];
  out.square = sum[cpu::kRowSquare];
  const bool broken = sum[kBroken] > 0.0;
  out.lowest = broken ? NAN : sum[cpu::kRowLowest];
  out.highest = broken ? NAN : sum[cpu::kRowHighest];
  out.clipped_low = sum[cpu::kRowClippedLow];
  out.clipped_high = sum[cpu::kRowClippedHigh];
  out.clipped_delta = sum[cpu::kRowClippedDelta];
  out.outside = sum[cpu::kRowOutside];
  out.slope = sum[cpu::kRowSlope];
  cpu::finish_row(a.f, static_cast<double>(ratio), &out);
  a.rows[row] = out;
}

__device__ __forceinline__ double number(const PolicyNumber& x) {
  if (x.kind == PolicyNumber::kInt64)
    return static_cast<double>(*static_cast<const int64_t*>(x.data));
  if (x.kind == PolicyNumber::kInt32)
    return static_cast<double>(*static_cast<const int32_t*>(x.data));
  double out[4] = {};
  load4<false>(x.data, static_cast<Dtype>(x.kind), 0, 1, out);
  return out[0];
}

// One block: a thread a value adds the rows in order; kRows of them at a time are in shared memory.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    finish_kernel(const RLIR_GRID_CONSTANT PolicyLossForward a) {
  constexpr int kRows = 64;
  RLIR_SHARED(double, rows, kRows* kRowValues);
  RLIR_SHARED(double, totals, kRowValues);
  RLIR_SHARED(double, whole, 1);
  const int value = threadIdx.x;
  const double* from = reinterpret_cast<const double*>(a.rows);
  double total = cpu::first_total(value);
  for (int64_t first = 0; first < a.f.rows; first += kRows) {
    const int count = static_cast<int>(min(static_cast<int64_t>(kRows), a.f.rows - first));
    for (int i = threadIdx.x; i < count * kRowValues; i += kThreads) {
      rows[i] = from[first * kRowValues + i];
    }
    __syncthreads();
    for (int i = 0; value < kRowValues && i < count; ++i) {
      const double* row = rows + i * kRowValues;
      if (row[cpu::kRowTokens] != 0.0) total = cpu::join_total(value, total, row[value]);
    }
    __syncthreads();
  }
  if (value < kRowValues) totals[value] = total;
  __syncthreads();
  if (threadIdx.x == 0) {
    double all[kRowValues], seen[cpu::kPolicyLossStatistics];
#pragma unroll
    for (int i = 0; i < kRowValues; ++i) all[i] = totals[i];
    cpu::statistics_of(a.f, all, seen);
#pragma unroll
    for (int i = 0; i < cpu::kPolicyLossStatistics; ++i) {
      static_cast<T*>(a.statistics)[i] = static_cast<T>(seen[i]);
    }
    const bool read = a.normalizer.data != nullptr;
    const double given = read ? number(a.normalizer) : a.given;
    const bool right = !read || given > 0.0;
    whole[0] = right ? cpu::common_divisor(a.f, all[cpu::kRowTokens], given) : NAN;
    *static_cast<T*>(a.loss) = static_cast<T>(all[cpu::kRowTerm] / whole[0]);
    RLIR_DEVICE_ASSERT(right, "policy_loss: normalizer must be > 0");
  }
  __syncthreads();
  for (int64_t row = threadIdx.x; row < a.f.rows; row += kThreads) {
    const PolicyLossRow& r = a.rows[row];
    a.scales[row] = 1.0 / (cpu::row_divisor(a.f, r.tokens) * whole[0]);
    a.scales[a.f.rows + row] = r.slope;
    a.scales[2 * a.f.rows + row] = r.ratio;
  }
}

template <typename T, bool kWide>
__global__ void __launch_bounds__(kThreads, 3)
    backward_kernel(const RLIR_GRID_CONSTANT PolicyLossBackward a,
                    const RLIR_GRID_CONSTANT cpu::Token<T> token) {
  const PolicyLoss& f = a.f;
  const int64_t chunks = (f.columns + 4 * kThreads - 1) / (4 * kThreads);
  const int64_t row = blockIdx.x / chunks;
  const int64_t column = (blockIdx.x - row * chunks) * 4 * kThreads + 4 * threadIdx.x;
  const int n = tokens_from(f, column);
  if (n == 0) return;
  const T all = static_cast<T>(a.scales[row] * number(a.grad));
  const T of_row = static_cast<T>(a.scales[f.rows + row]);
  const T shared = static_cast<T>(a.scales[2 * f.rows + row]);
  const T kl_weight = static_cast<T>(f.kl_weight);
  const bool has_kl = f.ref_logprob.data != nullptr && f.kl_weight != 0.0;
  const bool by_row = f.sequence && !f.cispo;
  T p[4], o[4], g[4], x[4];
  load_tokens<kWide>(f.logprob, row, column, n, p);
  load_tokens<kWide>(f.old_logprob, row, column, n, o);
  const uint32_t mask = load_mask<kWide>(f, row, column, n);
  T c[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    c[i] = f.sequence ? shared : exp_of<T>(p[i] - o[i]).exp;
    g[i] = of_row;  // 0 at token level
  }
  if (!by_row) {
    T d[4];
    load_tokens<kWide>(f.advantages, row, column, n, x);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      d[i] = f.cispo ? (x[i] == T(0) ? T(0) : token.at_most_high(c[i]) * x[i])
                     : token.slope(c[i], x[i]);
    }
    if (f.rollout_logprob.data != nullptr) {
      T u[4];
      load_tokens<kWide>(f.rollout_logprob, row, column, n, u);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        typename Simd<T>::Int cut;
        const T v = token.importance(o[i], u[i], &cut);
        d[i] = x[i] == T(0) ? T(0) : d[i] * v;
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) g[i] -= d[i];
  }
  if (has_kl) {
    load_tokens<kWide>(f.ref_logprob, row, column, n, x);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      T d = token.kl_slope(p[i], x[i]);
      if (f.kl_importance) {
        if (!f.sequence) d += token.kl(p[i], x[i]);
        d = d * c[i];
      }
      g[i] += kl_weight * d;
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) g[i] = (mask >> 8 * i & 0xffu) != 0 ? g[i] * all : T(0);
  store_rounded<kWide>(a.gradient, f.logprob.dtype, row * f.columns + column, n, g);
}

// Whether four tokens at a time can be read of everything.
bool can_be_wide(const PolicyLoss& f) {
  const auto fits = [](const void* p, int64_t row_stride, int64_t stride, uintptr_t alignment) {
    return p == nullptr || stride == 0 ||
           (stride == 1 && row_stride % 4 == 0 && reinterpret_cast<uintptr_t>(p) % alignment == 0);
  };
  const PolicyLoss::Matrix* const all[kMatrices] = {&f.logprob, &f.old_logprob, &f.advantages,
                                                    &f.ref_logprob, &f.rollout_logprob};
  for (const PolicyLoss::Matrix* m : all) {
    if (!fits(m->data, m->row_stride, m->stride, 16)) return false;
  }
  return f.columns % 4 == 0 && (f.mask == nullptr || f.mask_stride == 1) &&
         fits(f.mask, f.mask_row_stride, f.mask_stride, 4);
}

template <typename T>
int forward(const PolicyLossForward& a, void* stream) {
  if (a.f.rows > 0) {
    const auto kernel = can_be_wide(a.f) ? row_kernel<T, true> : row_kernel<T, false>;
    const dim3 rows(static_cast<unsigned>(a.f.rows));
    const int error = launch(kernel, rows, dim3(kThreads), 0, stream, a, cpu::Token<T>(a.f));
    if (error != 0) return error;
  }
  return launch(finish_kernel<T>, dim3(1), dim3(kThreads), 0, stream, a);
}

template <typename T>
int backward(const PolicyLossBackward& a, void* stream) {
  const bool wide = can_be_wide(a.f) && reinterpret_cast<uintptr_t>(a.gradient) % 16 == 0;
  const auto kernel = wide ? backward_kernel<T, true> : backward_kernel<T, false>;
  const int64_t blocks = a.f.rows * ceil_div<int64_t>(a.f.columns, 4 * kThreads);
  return launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0, stream, a,
                cpu::Token<T>(a.f));
}

}  // namespace

int policy_loss(const PolicyLossForward& a, void* stream) {
  return a.f.float64 ? forward<double>(a, stream) : forward<float>(a, stream);
}

int policy_loss_backward(const PolicyLossBackward& a, void* stream) {
  return a.f.float64 ? backward<double>(a, stream) : backward<float>(a, stream);
}

}  // namespace rlir::cuda
