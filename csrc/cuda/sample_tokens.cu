// Why it looks like this: a block takes a row, and the row stays on the multiprocessor. z and
// masses lie in shared memory (in workspace for large vocabularies); exp is taken twice, once for
// the masses and once for the sums; nothing is sorted. A threshold is searched in the order of the
// floats' bits, seven candidates at a time: each pass keeps an eighth of the interval, eleven
// passes find one of 2^32 values, whatever the logits are.
//
// Masses are integers, multiples of 2^-32, so that no order of addition can show. The sums of the
// softmax are in the order of cpu/softmax.h: 16 lanes take a block of 256 tokens, lane i is
// accumulator i, and one thread joins the blocks in their order. So tokens, supports and bits are
// those of the CPU kernel.
//
// This file is longer than most: the steps are one kernel and mean nothing apart.
#include "cuda/sample_tokens.cuh"

#include "cpu/softmax.h"
#include "cuda/portable.cuh"

namespace rlir::cuda {
namespace {

using cpu::kSoftmaxBlock;
using cpu::kSoftmaxLanes;
using Mass = unsigned long long;  // in units of 2^-32, or a number of tokens

constexpr int kThreads = 512, kWarps = kThreads / 32, kEach = kSoftmaxBlock / 32;
constexpr int kProbes = 7;  // thresholds that a pass weighs
constexpr uint32_t kAllLanes = 0xffffffffu;
constexpr int64_t kMaxShared = 96 * 1024;

// In the support: z > threshold, or z == threshold and token <= last.
struct Cut {
  float threshold;
  int32_t last;
  __device__ bool has(float z, int64_t token) const {
    return z > threshold || (z == threshold && token <= last);
  }
};

// A row in its space. Tokens are counted from `begin`, a multiple of kSoftmaxBlock.
struct Row {
  float *z, *mass;
  float *block_max, *factor, *sum, *dot;  // [blocks]
  Mass* weight;                           // [blocks]
  int64_t begin;
  int blocks;
};

struct Shared {
  Mass partial[2][kWarps][kProbes];
  uint32_t bad;
  int64_t reached;
};

RLIR_ANYWHERE inline int64_t first_of(int64_t low) { return low / kSoftmaxBlock * kSoftmaxBlock; }
RLIR_ANYWHERE inline int blocks_of(int64_t low, int64_t high) {
  return static_cast<int>((high - first_of(low) + kSoftmaxBlock - 1) / kSoftmaxBlock);
}
RLIR_ANYWHERE inline int64_t space_of(int64_t low, int64_t high) {
  return blocks_of(low, high) * (8 * kSoftmaxBlock + 4 * 4 + 8);
}

__device__ __forceinline__ Row row_in(void* space, int64_t low, int64_t high) {
  Row r;
  r.begin = first_of(low);
  r.blocks = blocks_of(low, high);
  r.z = static_cast<float*>(space);
  r.mass = r.z + r.blocks * kSoftmaxBlock;
  r.weight = reinterpret_cast<Mass*>(r.mass + r.blocks * kSoftmaxBlock);
  r.block_max = reinterpret_cast<float*>(r.weight + r.blocks);
  r.factor = r.block_max + r.blocks;
  r.sum = r.factor + r.blocks;
  r.dot = r.sum + r.blocks;
  return r;
}

__device__ __forceinline__ Mass units(float mass) {
  return static_cast<Mass>(mass * 4294967296.0f);
}

// Sum over a warp; below 2^58.
__device__ __forceinline__ Mass warp_sum(Mass x) {
  const uint32_t mask = (1u << 26) - 1u;
  const uint32_t low = __reduce_add_sync(kAllLanes, static_cast<uint32_t>(x) & mask);
  const uint32_t high = __reduce_add_sync(kAllLanes, static_cast<uint32_t>(x >> 26));
  return (static_cast<Mass>(high) << 26) + low;
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    const float other = __shfl_xor_sync(kAllLanes, x, distance);
    x = other > x ? other : x;
  }
  return x;
}

// Integers in the order of floats, and back.
__device__ __forceinline__ int64_t key_of(float x) {
  const int32_t bits = __builtin_bit_cast(int32_t, x);
  return bits < 0 ? bits ^ 0x7fffffff : bits;
}
__device__ __forceinline__ float value_of(int64_t key) {
  const int32_t bits = static_cast<int32_t>(key);
  return __builtin_bit_cast(float, bits < 0 ? bits ^ 0x7fffffff : bits);
}

// Eight logits from `token` on as float32; -infinity outside of [low, high).
template <typename T>
__device__ __forceinline__ void load_logits(const SampleTokens& a, int64_t row, int64_t token,
                                            float (&x)[kEach]) {
  const T* in = static_cast<const T*>(a.logits) + row * a.row_stride;
  const T* from = in + token * a.token_stride;
  const bool inside = token >= a.low && token + kEach <= a.high;
  if (inside && a.token_stride == 1 && reinterpret_cast<uintptr_t>(from) % 16 == 0) {
    if constexpr (sizeof(T) == 4) {
      const float4 p = reinterpret_cast<const float4*>(from)[0];
      const float4 q = reinterpret_cast<const float4*>(from)[1];
      x[0] = p.x, x[1] = p.y, x[2] = p.z, x[3] = p.w;
      x[4] = q.x, x[5] = q.y, x[6] = q.z, x[7] = q.w;
    } else {
      const uint4 q = *reinterpret_cast<const uint4*>(from);
      const uint32_t word[4] = {q.x, q.y, q.z, q.w};
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const uint32_t bits = i % 2 == 0 ? word[i / 2] << 16 : word[i / 2] & 0xffff0000u;
        x[i] = __builtin_bit_cast(float, bits);
      }
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const bool here = token + i >= a.low && token + i < a.high;
    x[i] = here ? static_cast<float>(load(from + i * a.token_stride)) : -INFINITY;
  }
}

// Fills z, block_max, factor and mass; returns the row's maximum. A row without a distribution sets
// `bad`: a NaN, an infinite maximum or none that is finite.
__device__ __forceinline__ float exponentials(const SampleTokens& a, int64_t row, const Row& r,
                                              Shared* shared) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int b = warp; b < r.blocks; b += kWarps) {
    const int64_t at = b * kSoftmaxBlock + lane * kEach;
    float x[kEach];
    if (a.dtype == Dtype::kFloat32) {
      load_logits<float>(a, row, r.begin + at, x);
    } else {
      load_logits<BFloat16>(a, row, r.begin + at, x);
    }
    float most = -INFINITY;
    bool nan = false;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      if (a.temperature != 1.0f) x[i] = x[i] / a.temperature;
      nan = nan || x[i] != x[i];
      most = x[i] > most ? x[i] : most;
      r.z[at + i] = x[i];
    }
    most = warp_max(most);
    nan = __any_sync(kAllLanes, nan);
    if (lane == 0) {
      r.block_max[b] = most;
      if (nan) atomicOr(&shared->bad, 1u);
    }
  }
  __syncthreads();
  float maximum = -INFINITY;
  for (int b = lane; b < r.blocks; b += 32) {
    maximum = r.block_max[b] > maximum ? r.block_max[b] : maximum;
  }
  maximum = warp_max(maximum);
  for (int b = warp; b < r.blocks; b += kWarps) {
    const float top = r.block_max[b], reference = cpu::reference_of(top);
    const float factor = exp(top == -INFINITY ? 0.0f : top - maximum);
    if (lane == 0) r.factor[b] = factor;
    for (int i = lane; i < kSoftmaxBlock; i += 32) {
      const int64_t at = b * kSoftmaxBlock + i;
      const float mass = exp(r.z[at] - reference) * factor;
      r.mass[at] = mass < 0x1p-9f ? (mass + 0x1p-9f) - 0x1p-9f : mass;
    }
  }
#if !defined(RLIR_FAULT_BARRIER)
  __syncthreads();
#endif
  return maximum;
}

// Sums over the threads of a block; they pass here in the same order, with a `turn` that
// alternates.
template <int kCount>
__device__ __forceinline__ Mass block_sums(Shared* shared, const Mass (&own)[kCount], int turn) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const Mass sum = warp_sum(own[i]);
    if (lane == 0) shared->partial[turn][warp][i] = sum;
  }
  __syncthreads();
  Mass all = 0;  // lane i has sum i
  if (lane < kCount) {
    for (int w = 0; w < kWarps; ++w) all += shared->partial[turn][w][lane];
  }
  return all;
}

template <bool kCount>
__device__ __forceinline__ Mass weight_of(const Row& r, int64_t at) {
  return kCount ? Mass(1) : units(r.mass[at]);
}

struct Threshold {
  float z;
  Mass above;  // weight of what is larger
};

// The z of which the weight above falls short of `target` and the weight at or above does not; the
// lowest if all weight falls short.
template <bool kCount>
__device__ __forceinline__ Threshold find_threshold(const Row& r, Shared* shared, float maximum,
                                                    Mass target) {
  const int lane = threadIdx.x % 32;
  // The answer is in [low, high). A maximum of -0 becomes 0, for no value lies between the two.
  int64_t low = key_of(-INFINITY) + 1, high = key_of(maximum + 0.0f) + 1;
  Mass above = 0;  // weight at or above `high`
  for (int turn = 0; high - low > 1; turn ^= 1) {
    const auto key = [low, high](int i) {
      const int64_t at = low + (high - low) * (i + 1) / (kProbes + 1);
      return at > low ? at : low + 1;
    };
    float probe[kProbes];
#pragma unroll
    for (int i = 0; i < kProbes; ++i) probe[i] = value_of(key(i));
    Mass weight[kProbes] = {};
    for (int64_t i = threadIdx.x; i < r.blocks * kSoftmaxBlock; i += kThreads) {
      const float z = r.z[i];
      const Mass own = weight_of<kCount>(r, i);
#pragma unroll
      for (int p = 0; p < kProbes; ++p) weight[p] += z >= probe[p] ? own : Mass(0);
    }
    const Mass all = block_sums<kProbes>(shared, weight, turn);
    // Those that reach the target come first.
    const int reach =
        __popc(__ballot_sync(kAllLanes, lane < kProbes && all >= target) & ((1u << kProbes) - 1u));
    if (reach < kProbes) above = __shfl_sync(kAllLanes, all, reach);
    const int64_t next_low = reach > 0 ? key(reach - 1) : low;
    if (reach < kProbes) high = key(reach);
    low = next_low;
  }
  return {value_of(low) + 0.0f, above};  // + 0: -0 and 0 are one value
}

// By one warp: the first i < n at which `before` and the weights up to it reach the target, or n.
// `before` becomes what lies before it.
template <typename Weight>
__device__ __forceinline__ int first_reaching(int n, Weight weight, Mass target, Mass* before) {
  const int lane = threadIdx.x % 32;
  for (int first = 0; first < n; first += 32) {
    const Mass own = first + lane < n ? weight(first + lane) : 0;
    Mass up_to = own;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const Mass other = __shfl_up_sync(kAllLanes, up_to, distance);
      if (lane >= distance) up_to += other;
    }
    const uint32_t reach = __ballot_sync(kAllLanes, first + lane < n && *before + up_to >= target);
    if (reach != 0) {
      const int at = __ffs(static_cast<int>(reach)) - 1;
      *before += __shfl_sync(kAllLanes, up_to - own, at);
      return first + at;
    }
    *before += __shfl_sync(kAllLanes, up_to, 31);
  }
  return n;
}

// By the first warp: the first token at which `before` and the weights of tokens up to it reach the
// target, by blocks (r.weight) and then by tokens; or -1.
template <typename Weight>
__device__ __forceinline__ int64_t first_token(const Row& r, Weight weight, Mass target,
                                               Mass before) {
  const int block = first_reaching(r.blocks, [&](int b) { return r.weight[b]; }, target, &before);
  if (block == r.blocks) return -1;
  const int64_t start = static_cast<int64_t>(block) * kSoftmaxBlock;
  return start +
         first_reaching(kSoftmaxBlock, [&](int i) { return weight(start + i); }, target, &before);
}

// The cut at a threshold: its ties in the order of tokens, until the weight is reached.
template <bool kCount>
__device__ __forceinline__ Cut cut_at(const Row& r, Shared* shared, const Threshold& threshold,
                                      Mass target) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const auto tie = [&](int64_t at) {
    return r.z[at] == threshold.z ? weight_of<kCount>(r, at) : Mass(0);
  };
  for (int b = warp; b < r.blocks; b += kWarps) {
    Mass own = 0;
    for (int i = lane; i < kSoftmaxBlock; i += 32) own += tie(b * kSoftmaxBlock + i);
    own = warp_sum(own);
    if (lane == 0) r.weight[b] = own;
  }
  __syncthreads();
  if (warp == 0) {
    const int64_t at = first_token(r, tie, target, threshold.above);
    if (lane == 0) shared->reached = at;
  }
  __syncthreads();
  const int64_t at = shared->reached;  // if not even all ties reach the target, all are in
  return {threshold.z, at < 0 ? 0x7fffffff : static_cast<int32_t>(r.begin + at)};
}

// The mass of all tokens, the same in all threads.
__device__ __forceinline__ Mass total_mass(const Row& r, Shared* shared) {
  Mass own[1] = {0};
  for (int64_t i = threadIdx.x; i < r.blocks * kSoftmaxBlock; i += kThreads) {
    own[0] += units(r.mass[i]);
  }
  const Mass all = __shfl_sync(kAllLanes, block_sums<1>(shared, own, 0), 0);
  __syncthreads();  // others use the same place next
  return all;
}

__device__ __forceinline__ Cut row_cut(const SampleTokens& a, const Row& r, Shared* shared,
                                       float maximum) {
  Cut cut = {-INFINITY, -1};
  if (a.top_k > 0 && a.top_k < a.high - a.low) {
    const Mass k = static_cast<Mass>(a.top_k);
    cut = cut_at<true>(r, shared, find_threshold<true>(r, shared, maximum, k), k);
    for (int64_t i = threadIdx.x; i < r.blocks * kSoftmaxBlock; i += kThreads) {
      if (!cut.has(r.z[i], r.begin + i)) r.mass[i] = 0.0f;
    }
    __syncthreads();
  }
  if (a.top_p < 1.0) {
    // The fewest units that are at least top_p of all; the products by 2^32 are exact.
    const double total = static_cast<double>(total_mass(r, shared)) * 0x1p-32;
    const Mass target = static_cast<Mass>(ceil(a.top_p * total * 0x1p32));
    cut = cut_at<false>(r, shared, find_threshold<false>(r, shared, maximum, target), target);
  }
  if (a.min_p > 0.0) {
    const float at = static_cast<float>(static_cast<double>(maximum) + log(a.min_p));
    if (at > cut.threshold) cut = {at, 0x7fffffff};
  }
  return cut;
}

// Of every block: sums of the softmax, and the mass, on the support. A block without any of it is
// marked by a sum below 0.
__device__ __forceinline__ void sum_blocks(const Row& r, const Cut& cut) {
  const int lane = threadIdx.x % kSoftmaxLanes, half = threadIdx.x & 16;
  const uint32_t team = 0xffffu << half;
  for (int b = threadIdx.x / kSoftmaxLanes; b < r.blocks; b += kThreads / kSoftmaxLanes) {
    const float top = r.block_max[b], reference = cpu::reference_of(top);
    float sum = 0.0f, dot = 0.0f;
    Mass mass = 0;
    const bool any = top != -INFINITY && !(top < cut.threshold);
    for (int i = lane; any && i < kSoftmaxBlock; i += kSoftmaxLanes) {
      const int64_t at = b * kSoftmaxBlock + i;
      const float x = r.z[at];
      const bool in = cut.has(x, r.begin + at);
      const float e = in ? exp(x - reference) : 0.0f;
      sum += e;
      dot = cpu::add_dot(e, x - reference, dot);
      mass += in ? units(r.mass[at]) : Mass(0);
    }
#pragma unroll
    for (int distance = kSoftmaxLanes / 2; distance > 0; distance /= 2) {
      sum = sum + __shfl_xor_sync(team, sum, distance, kSoftmaxLanes);
      dot = dot + __shfl_xor_sync(team, dot, distance, kSoftmaxLanes);
      mass += __shfl_xor_sync(team, mass, distance, kSoftmaxLanes);
    }
    if (lane == 0) {
      r.sum[b] = any ? sum : -1.0f;
      r.dot[b] = dot;
      r.weight[b] = mass;
    }
  }
}

__global__ void __launch_bounds__(kThreads, 1) sample_kernel(SampleTokens a) {
  RLIR_SHARED(Shared, shared, 1);
  RLIR_SHARED_DYNAMIC(unsigned char, room);
  const int64_t row = blockIdx.x;
  const int lane = threadIdx.x % 32;
  void* space = room;
  if (a.space != nullptr) {
    space = static_cast<unsigned char*>(a.space) + row * space_of(a.low, a.high);
  }
  const Row r = row_in(space, a.low, a.high);
  const uint64_t seed = a.seed_tensor == nullptr ? a.seed : static_cast<uint64_t>(*a.seed_tensor);
  const uint64_t count =
      a.offset_tensor == nullptr ? a.offset : static_cast<uint64_t>(*a.offset_tensor);
  if (threadIdx.x == 0) shared->bad = 0;
  __syncthreads();
  const float maximum = exponentials(a, row, r, shared);
  const bool drawn =
      shared->bad == 0 && maximum != -INFINITY && maximum != INFINITY && count >> 32 == 0;
  Cut cut = {INFINITY, -1};
  if (drawn) {  // the same for all threads
    cut = row_cut(a, r, shared, maximum);
    sum_blocks(r, cut);
    __syncthreads();
  }
  if (drawn && threadIdx.x < 32) {
    Mass total = 0;
    for (int b = lane; b < r.blocks; b += 32) total += r.weight[b];
    total = warp_sum(total);
    const uint64_t id =
        static_cast<uint64_t>(a.row_ids == nullptr ? row : a.row_ids[row * a.row_id_stride]);
    const PhiloxKey key = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
    const Mass u = philox_fraction(static_cast<uint32_t>(count), id, key);
    const Mass target = __umul64hi(u, total) + 1;  // the running mass exceeds u / 2^64 of all
    const auto mass = [&](int64_t at) {
      return cut.has(r.z[at], r.begin + at) ? units(r.mass[at]) : Mass(0);
    };
    const int64_t at = first_token(r, mass, target, 0);
    if (lane == 0) {
      double s = 0.0, dot = 0.0;
      for (int b = 0; b < r.blocks; ++b) {
        if (r.sum[b] < 0.0f) continue;
        cpu::join_block(r.block_max[b], maximum, r.factor[b], r.sum[b], r.dot[b], &s, &dot);
      }
      const double log_sum = log(s);
      a.token[row] = r.begin + at;
      a.logprob[row] = cpu::row_logprob(r.z[at], maximum, log_sum);
      a.entropy[row] = cpu::row_entropy(s, dot, log_sum);
    }
  }
  if (!drawn && threadIdx.x == 0) {
    a.token[row] = a.low;
    a.logprob[row] = a.entropy[row] = NAN;
  }
  if (a.support != nullptr) {
    const int64_t bytes = (a.tokens + 7) / 8;
    for (int64_t byte = threadIdx.x; byte < bytes; byte += kThreads) {
      const int64_t first = byte * 8 - r.begin;
      uint32_t bits = 0;
      if (drawn && first >= 0 && first < r.blocks * kSoftmaxBlock) {
        for (int i = 0; i < 8; ++i) {
          bits |= cut.has(r.z[first + i], byte * 8 + i) ? 1u << i : 0u;
        }
      }
      a.support[row * bytes + byte] = static_cast<uint8_t>(bits);
    }
  }
  RLIR_DEVICE_ASSERT(count >> 32 == 0, "sample_tokens: offset must be from 0 and below 2^32");
  RLIR_DEVICE_ASSERT(drawn,
                     "sample_tokens: logits must have a finite largest value in vocab_range and "
                     "no NaN");
}

}  // namespace

int64_t sample_tokens_space(int64_t low, int64_t high) {
  const int64_t bytes = space_of(low, high);
  return bytes <= kMaxShared ? 0 : bytes;
}

int sample_tokens(const SampleTokens& a, void* stream) {
  const size_t shared = a.space != nullptr ? 0 : static_cast<size_t>(space_of(a.low, a.high));
  return launch(sample_kernel, dim3(static_cast<unsigned>(a.rows)), dim3(kThreads), shared, stream,
                a);
}

}  // namespace rlir::cuda
