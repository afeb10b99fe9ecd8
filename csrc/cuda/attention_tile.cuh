// A tile of queries against keys on tensor cores: FlashAttention-2. Four warps with 16 kM rows of
// the tile each go through blocks of 64 keys that cp.async brings through two stages; scores,
// probabilities and the output's sums stay in registers (mma.sync m16n8k16, whose sums are laid out
// as its left operand).
//
//   z' = s |scale| log2 e, m' = max(m, max z'), f = 2^(m - m'), e = bf16(2^(z' - m'))
//   l  = l f + sum e,  acc = acc f + sum e v
//
// Blocks are anchored at slots of their part of the keys, and one that a query sees nothing of
// changes none of its bits: f is 1 and e is 0. So a query's result does not depend on the others of
// its tile. Sums of e are a product with ones.
//
// Keys that no row of a warp sees may hold anything, NaN as well: their scores are replaced, and
// their values are read as zeros.
#pragma once

#include "cuda/attention.cuh"

namespace rlir::cuda {
namespace {

constexpr uint32_t kOnes = 0x3f803f80u;  // two bf16

// Which blocks a tile goes through: of parts first_part .. last_part, those from `begin` to `end`.
struct BlockRange {
  int first_part, last_part, begin, end;
};

// The same with numbers: blocks count[0] of part 0 from begin[0] on, then those of part 1. It waits
// in shared memory: registers are full.
struct Plan {
  int begin[2], count[2], length[2];

  // Where the i-th block begins in its part.
  __device__ __forceinline__ int first(int i) const {
    return (i < count[0] ? begin[0] + i : begin[1] + i - count[0]) * kKeyBlock;
  }
};

__device__ __forceinline__ Plan plan_of(const Attention& a, int64_t sequence, const Span& tile,
                                        const BlockRange& range) {
  const KeyCount keys = keys_of(a, sequence);
  Plan plan{{0, 0}, {0, 0}, {keys.first, keys.all - keys.first}};
#pragma unroll
  for (int p = 0; p < 2; ++p) {
    if (p < range.first_part || p > range.last_part) continue;
    const int before = p == 0 ? 0 : keys.first;
    const int low = max(static_cast<int>(tile.low) - before, 0) / kKeyBlock;
    const int high = min(static_cast<int>(tile.high) - before, plan.length[p]);
    plan.begin[p] = max(low, range.begin);
    const int end = min((high + kKeyBlock - 1) / kKeyBlock, range.end);
    plan.count[p] = max(end - plan.begin[p], 0);
  }
  return plan;
}

template <int D, int kM>
class AttentionTile {
 public:
  static constexpr int kRows = 64 * kM, kWarps = kAttentionThreads / 32;
  static constexpr uint32_t kTile = kKeyBlock * D * 2;  // bytes; a stage has K and V
  static constexpr size_t kShared = 4 * kTile + kRows * sizeof(Sight) + kWarps * sizeof(Span) +
                                    sizeof(Plan);
  static_assert(kM <= 2);  // queries come in through the second stage

  // Rows first_row .. of `rows`, which belong to sequences from `sequence` on.
  __device__ __forceinline__ void run(const Attention& a, int64_t sequence, int kv_head,
                                      int first_row, int rows, const BlockRange& range,
                                      unsigned char* shared) {
    base_ = ptx::shared_address(shared);
    sights_ = reinterpret_cast<Sight*>(shared + 4 * kTile);
    scale_ = log2_scale(a);
    const Span tile = look(a, sequence, kv_head, first_row, rows);
#pragma unroll
    for (int j = 0; j < kM; ++j) {
      top_[j][0] = top_[j][1] = -INFINITY;
      total_[j][0] = total_[j][1] = 0.0f;
#pragma unroll
      for (int n = 0; n < D / 8; ++n) {
        sums_[j][n][0] = sums_[j][n][1] = sums_[j][n][2] = sums_[j][n][3] = 0.0f;
      }
    }
    if (threadIdx.x == 0) *plan() = plan_of(a, sequence, tile, range);
    __syncthreads();
    const int blocks = plan()->count[0] + plan()->count[1];
    if (blocks == 0) return;
    const auto copy = [&](int i) {
      const Plan& plan = *this->plan();
      const int p = i < plan.count[0] ? 0 : 1, first = plan.first(i);
      const KeyPart& part = a.part[p];
      const int64_t batch = p == 0 ? sequence / a.group : sequence;
      const uint32_t to = base_ + i % 2 * 2 * kTile;
      copy_keys<D, kKeyBlock>(to, head_of(part.k, batch, kv_head), part.k.token, first,
                              plan.length[p]);
      copy_keys<D, kKeyBlock>(to + kTile, head_of(part.v, batch, kv_head), part.v.token, first,
                              plan.length[p]);
    };
    copy_queries<D, kRows>(base_ + 2 * kTile, a, a.q, sequence, kv_head, first_row, rows);
    copy(0);
    ptx::cp_async_commit();
    load_queries(a.scale < 0.0);
#pragma unroll 1
    for (int i = 0; i < blocks; ++i) {
#if defined(RLIR_FAULT_COPY_WAIT)
      ptx::cp_async_wait<1>();
#else
      ptx::cp_async_wait<0>();
#endif
#if !defined(RLIR_FAULT_COPY_BARRIER)
      __syncthreads();  // the copies of all threads are there, and all have left the stage before
#endif
      if (i + 1 < blocks) copy(i + 1);
      ptx::cp_async_commit();
      const bool second = i >= plan()->count[0];
      const int before = second ? plan()->length[0] : 0;
      const int slot = before + plan()->first(i), end = before + plan()->length[second];
      const uint32_t k = base_ + i % 2 * 2 * kTile;
      const Span span = spans()[threadIdx.x / 32];
      if (!span.touches(slot)) continue;
      if (span.covers(slot) && slot + kKeyBlock <= end) {
        step<false>(a.mask, k, k + kTile, slot, end);
      } else {
        step<true>(a.mask, k, k + kTile, slot, end);
      }
    }
    ptx::cp_async_wait<0>();
  }

  // Divides by the sums and writes [N][T][H][D] and lse.
  __device__ __forceinline__ void finish(const Attention& a, int64_t sequence, int kv_head,
                                         int first_row, int rows, void* out, float* lse) const {
    const int lane = threadIdx.x % 32;
    __syncthreads();  // all have left the stages: their memory takes rows of the output
#pragma unroll
    for (int j = 0; j < kM; ++j) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int in_tile = warp_row() + 16 * j + 8 * half + lane / 4, row = first_row + in_tile;
        const float total = sees_nothing(in_tile) ? 0.0f : total_[j][half];
        const float inverse = total != 0.0f ? 1.0f / total : 0.0f;
#pragma unroll
        for (int n = 0; n < D / 8; ++n) {
          const float* s = &sums_[j][n][2 * half];
          const uint32_t word =
              total != 0.0f ? ptx::pack_bf16(s[0] * inverse, s[1] * inverse) : 0u;
          put_word(in_tile, n, word);
        }
        if (lse != nullptr && lane % 4 == 0 && row < rows) {
          const float value = top_[j][half] * scale_ + ptx::lg2(total);
          lse[flat(a, query_of(a, sequence, kv_head, row))] =
              total != 0.0f ? value * kLn2 : -INFINITY;
        }
      }
    }
#if !defined(RLIR_FAULT_WARP)
    __syncwarp();
#endif
    constexpr int kChunks = D / 8;
#pragma unroll
    for (int e = lane; e < 16 * kM * kChunks; e += 32) {
      const int in_tile = warp_row() + e / kChunks, chunk = e % kChunks;
      if (first_row + in_tile >= rows) continue;
      const int64_t at = flat(a, query_of(a, sequence, kv_head, first_row + in_tile)) * D;
      *reinterpret_cast<uint4*>(static_cast<uint16_t*>(out) + at + 8 * chunk) =
          *reinterpret_cast<const uint4*>(stage() + tile_at<D>(in_tile, chunk));
    }
  }

  // Writes the sums as they are, and m and l: [N][T][H][D] floats, [N][T][H] pairs.
  __device__ __forceinline__ void leave(const Attention& a, int64_t sequence, int kv_head,
                                        int first_row, int rows, float* sums, float2* scales) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int j = 0; j < kM; ++j) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int in_tile = warp_row() + 16 * j + 8 * half + lane / 4, row = first_row + in_tile;
        if (row >= rows) continue;
        const int64_t at = flat(a, query_of(a, sequence, kv_head, row));
        const float total = sees_nothing(in_tile) ? 0.0f : total_[j][half];
        if (lane % 4 == 0) scales[at] = make_float2(top_[j][half] * scale_, total);
        if (total == 0.0f) continue;  // nobody will read them
        float* to = sums + at * D + lane % 4 * 2;
#pragma unroll
        for (int n = 0; n < D / 8; ++n) {
          *reinterpret_cast<float2*>(to + 8 * n) =
              make_float2(sums_[j][n][2 * half], sums_[j][n][2 * half + 1]);
        }
      }
    }
  }

 private:
  static __device__ __forceinline__ int warp_row() { return threadIdx.x / 32 * 16 * kM; }
  __device__ __forceinline__ unsigned char* stage() const {
    return reinterpret_cast<unsigned char*>(sights_) - 4 * kTile;
  }
  __device__ __forceinline__ Span* spans() const {  // of the rows of each warp
    return reinterpret_cast<Span*>(sights_ + kRows);
  }
  __device__ __forceinline__ Plan* plan() const {
    return reinterpret_cast<Plan*>(spans() + kWarps);
  }
  __device__ __forceinline__ bool sees_nothing(int in_tile) const {
    return sights_[in_tile].low == kNever;
  }
  __device__ __forceinline__ void put_word(int in_tile, int chunk, uint32_t word) const {
    const int lane = threadIdx.x % 32;
    *reinterpret_cast<uint32_t*>(stage() + tile_at<D>(in_tile, chunk) + lane % 4 * 4) = word;
  }
  // What each row sees, to shared memory; of the warp's rows together; returns that of the tile's.
  __device__ __forceinline__ Span look(const Attention& a, int64_t sequence, int kv_head,
                                       int first_row, int rows) {
    const int lane = threadIdx.x % 32;
    Span span = no_span();
    if (lane < 16 * kM) {
      const int in_tile = warp_row() + lane;
      Sight sight{kNever, 0, 0, 0};
      if (first_row + in_tile < rows) {
        const Query q = query_of(a, sequence, kv_head, first_row + in_tile);
        sight = sight_of(a, q.sequence, q.token);
      }
      sights_[in_tile] = sight;
      add(span, sight);
    }
    __syncwarp();
    span = over_warp(span);
    if (lane == 0) spans()[threadIdx.x / 32] = span;
    __syncthreads();
    Span tile = no_span();
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      tile.low = min(tile.low, spans()[w].low);
      tile.high = max(tile.high, spans()[w].high);
    }
    return tile;
  }

  // Of a negative scale the queries take the sign, so that the largest score is the largest z.
  __device__ __forceinline__ void load_queries(bool negative) {
    ptx::cp_async_wait<0>();
    __syncthreads();
#pragma unroll
    for (int j = 0; j < kM; ++j) {
#pragma unroll
      for (int k = 0; k < D / 16; ++k) {
        load_left<D>(q_[j][k], base_ + 2 * kTile, warp_row() + 16 * j, 2 * k);
        if (!negative) continue;
#pragma unroll
        for (int e = 0; e < 4; ++e) q_[j][k][e] ^= 0x80008000u;
      }
    }
  }

  template <bool kMasked>
  __device__ __forceinline__ void step(const AttentionMask& mask, uint32_t k, uint32_t v,
                                       int slot, int end) {
    float s[kM][8][4];
#pragma unroll
    for (int j = 0; j < kM; ++j) {
#pragma unroll
      for (int n = 0; n < 8; ++n) s[j][n][0] = s[j][n][1] = s[j][n][2] = s[j][n][3] = 0.0f;
    }
#pragma unroll
    for (int d = 0; d < D / 16; ++d) {
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        uint32_t b[4];
        load_right<D>(b, k, 16 * n, 2 * d);
#pragma unroll
        for (int j = 0; j < kM; ++j) {
          ptx::mma_bf16(s[j][2 * n], q_[j][d], b[0], b[1]);
          ptx::mma_bf16(s[j][2 * n + 1], q_[j][d], b[2], b[3]);
        }
      }
    }
    uint32_t seen = kAllLanes;  // of keys 8 n + 2 (lane % 4) + e, bit 2 n + e: by a row of the warp
    if constexpr (kMasked) seen = hide(mask, slot, end, s);
    uint32_t p[kM][4][4];
#pragma unroll
    for (int j = 0; j < kM; ++j) {
      rescale(j, s[j]);
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        p[j][n / 2][n % 2 * 2] = ptx::pack_bf16(s[j][n][0], s[j][n][1]);
        p[j][n / 2][n % 2 * 2 + 1] = ptx::pack_bf16(s[j][n][2], s[j][n][3]);
      }
    }
#pragma unroll
    for (int j = 0; j < kM; ++j) {
      float total[4] = {};
#pragma unroll
      for (int i = 0; i < 4; ++i) ptx::mma_bf16(total, p[j][i], kOnes, kOnes);
      total_[j][0] += total[0];
      total_[j][1] += total[2];
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t even = pair_mask(seen >> 4 * i), odd = pair_mask(seen >> (4 * i + 2));
#pragma unroll
      for (int d = 0; d < D / 16; ++d) {
        uint32_t b[4];
        load_across<D>(b, v, 16 * i, 2 * d);
        if constexpr (kMasked) b[0] &= even, b[1] &= odd, b[2] &= even, b[3] &= odd;
#pragma unroll
        for (int j = 0; j < kM; ++j) {
          ptx::mma_bf16(sums_[j][2 * d], p[j][i], b[0], b[1]);
          ptx::mma_bf16(sums_[j][2 * d + 1], p[j][i], b[2], b[3]);
        }
      }
    }
  }

  // Scores that a row does not see, and those beyond the part of the keys, become -infinity.
  __device__ __forceinline__ uint32_t hide(const AttentionMask& mask, int slot, int end,
                                           float (&s)[kM][8][4]) const {
    const int lane = threadIdx.x % 32;
    const int tau[2] = {key_tau(mask, slot + lane), key_tau(mask, slot + 32 + lane)};
    uint32_t seen = 0;
#pragma unroll
    for (int j = 0; j < kM; ++j) {
      const Sight* sights = sights_ + warp_row() + 16 * j + lane / 4;
      Sight upper = sights[0], lower = sights[8];
      upper.high = min(upper.high, end);
      lower.high = min(lower.high, end);
#pragma unroll
      for (int n = 0; n < 8; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int at = 8 * n + lane % 4 * 2 + e;
          const int own = __shfl_sync(kAllLanes, tau[n / 4], at % 32);
          const bool first = sees(upper, slot + at, own), second = sees(lower, slot + at, own);
          if (!first) s[j][n][e] = -INFINITY;
          if (!second) s[j][n][2 + e] = -INFINITY;
          if (first || second) seen |= 1u << (2 * n + e);
        }
      }
    }
    return over_rows(seen);
  }

  // Scores to e; the sums so far to the new maximum.
  __device__ __forceinline__ void rescale(int j, float (&s)[8][4]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float most = top_[j][half];
#pragma unroll
      for (int n = 0; n < 8; ++n) most = max(most, max(s[n][2 * half], s[n][2 * half + 1]));
      most = max(most, __shfl_xor_sync(kAllLanes, most, 1));
      most = max(most, __shfl_xor_sync(kAllLanes, most, 2));
      const float reference = most == -INFINITY ? 0.0f : most * scale_;
      const float factor = ptx::ex2(top_[j][half] * scale_ - reference);  // 1 where it is the same
      top_[j][half] = most;
      total_[j][half] *= factor;
#pragma unroll
      for (int n = 0; n < D / 8; ++n) {
        sums_[j][n][2 * half] *= factor;
        sums_[j][n][2 * half + 1] *= factor;
      }
#pragma unroll
      for (int n = 0; n < 8; ++n) {
#pragma unroll
        for (int e = 2 * half; e < 2 * half + 2; ++e) {
          s[n][e] = ptx::ex2(__fmaf_rn(s[n][e], scale_, -reference));
        }
      }
    }
  }

  uint32_t q_[kM][D / 16][4];
  float sums_[kM][D / 8][4], total_[kM][2], top_[kM][2];
  float scale_;
  uint32_t base_;
  Sight* sights_;
};

}  // namespace
}  // namespace rlir::cuda
