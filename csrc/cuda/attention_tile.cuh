// A tile of queries against keys on tensor cores: FlashAttention-2. Four warps with 16 kM rows of
// the tile each go through blocks of 64 keys that cp.async brings through two stages; scores,
// probabilities and the output's sums stay in registers (mma.sync m16n8k16, whose sums are laid out
// as its left operand). A long file: a tile's loop and its state are one piece.
//
//   z' = s scale log2 e, m' = max(m, max z'), f = 2^(m - m'), e = bf16(2^(z' - m'))
//   l  = l f + sum e,  acc = acc f + sum e v
//
// Sums of e are a product with ones. Blocks are anchored at slots of the sequence, and one that a
// query sees nothing of changes none of its bits: f is 1 and e is 0. Sums begin anew with every
// chunk of 512 slots, and a chunk joins those before it,
//
//   m = max(m0, m1),  l = l0 2^(m0 - m) + l1 2^(m1 - m),  acc likewise
//
// so that decoding, where a block has a chunk (group_decode_attention.cu), has the same bits. They
// do not depend on the other queries of a tile, nor on where a prefix ends.
//
// Keys that no row of a warp sees may hold anything, NaN as well: their scores are replaced, and
// their values are read as zeros.
//
// The file is longer than others: the state of a tile is in registers, and so in one class.
#pragma once

#include "cuda/attention.cuh"

namespace rlir::cuda {
namespace {

// What a block hides from the rows of a warp: nothing; or keys; or stand-ins too (core/reach.h).
enum class Hides { kNothing, kKeys, kStandIns };

constexpr uint32_t kOnes = 0x3f803f80u;  // two bf16

// kParts: of the keys. kKeeps: there may be more than a chunk.
template <int D, int kM, int kParts, bool kKeeps>
class AttentionTile {
 public:
  static constexpr bool kRefreshes = kM == 1;  // refreshed masks: taller tiles lack registers
  static constexpr int kRows = 64 * kM, kWarps = kAttentionThreads / 32;
  static constexpr uint32_t kTile = kKeyBlock * D * 2;  // bytes; a stage has K and V
  static constexpr size_t kKept = kKeeps ? kAttentionThreads * kM * (2 * D + 4) : 0;
  static constexpr size_t kShared =
      4 * kTile + kRows * sizeof(Sight) + kWarps * sizeof(Span) + sizeof(Plan) + kKept;
  static_assert(kM <= 2);  // queries come in through the second stage

  // Rows first_row .. of `rows`, which belong to sequences from `sequence` on; blocks begin .. end.
  __device__ __forceinline__ void run(const Attention& a, int64_t sequence, int kv_head,
                                      int first_row, int rows, int begin, int end,
                                      unsigned char* shared) {
    base_ = ptx::shared_address(shared);
    sights_ = reinterpret_cast<Sight*>(shared + 4 * kTile);
    scale_ = log2_scale(a);
    const Span tile = look(a, sequence, kv_head, first_row, rows);
    clear();
    if (threadIdx.x == 0) *plan() = plan_of(a, sequence, tile, begin, end);
    __syncthreads();
    int block = plan()->begin;
    if (block >= plan()->end) return;
    const auto copy = [&](int i) {
      const uint32_t to = base_ + i % 2 * 2 * kTile;
      copy_block<D, kParts>(to, a, false, sequence, kv_head, i * kKeyBlock, plan()->keys);
      copy_block<D, kParts>(to + kTile, a, true, sequence, kv_head, i * kKeyBlock, plan()->keys);
    };
    const uint32_t queries = base_ + (block + 1) % 2 * 2 * kTile;
    copy_queries<D, kRows>(queries, a, a.q, sequence, kv_head, first_row, rows);
    copy(block);
    ptx::cp_async_commit();
    load_queries(queries);
    bool kept = false;
#pragma unroll 1
    for (; block < plan()->end; ++block) {
#if defined(RLIR_FAULT_COPY_WAIT)
      ptx::cp_async_wait<1>();
#else
      ptx::cp_async_wait<0>();
#endif
#if !defined(RLIR_FAULT_COPY_BARRIER)
      __syncthreads();  // the copies of all threads are there, and all have left the stage before
#endif
      if (block + 1 < plan()->end) copy(block + 1);
      ptx::cp_async_commit();
      if (kKeeps && block % kChunkBlocks == 0 && block > plan()->begin) {
        if (kept) join();
        keep();
        kept = true;
      }
      const int slot = block * kKeyBlock;
      const uint32_t k = base_ + block % 2 * 2 * kTile;
      const Span span = spans()[threadIdx.x / 32];
      if (!span.touches(slot)) continue;
      if (span.covers(slot)) {
        step<Hides::kNothing>(a.mask, k, k + kTile, slot);
      } else if (!kRefreshes || a.mask.kind != MaskKind::kRefreshed) {
        step<Hides::kKeys>(a.mask, k, k + kTile, slot);
      } else {
        step<Hides::kStandIns>(a.mask, k, k + kTile, slot);
      }
    }
    if (kept) join();
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
          const uint32_t word = total != 0.0f ? ptx::pack_bf16(s[0] * inverse, s[1] * inverse) : 0u;
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
                                        int first_row, int rows, float* sums,
                                        float2* scales) const {
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

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int j = 0; j < kM; ++j) {
      top_[j][0] = top_[j][1] = -INFINITY;
      total_[j][0] = total_[j][1] = 0.0f;
#pragma unroll
      for (int n = 0; n < D / 8; ++n) {
        sums_[j][n][0] = sums_[j][n][1] = sums_[j][n][2] = sums_[j][n][3] = 0.0f;
      }
    }
  }

  // A thread's own memory for the sums of the chunks so far: sums_[j][n], then top_ and total_ of
  // two rows, one to each of the four threads that have them.
  __device__ __forceinline__ float4* kept_sums(int j, int n) const {
    return reinterpret_cast<float4*>(plan() + 1) + (j * (D / 8) + n) * kAttentionThreads +
           threadIdx.x;
  }
  __device__ __forceinline__ float* kept_scale(int j) const {
    return reinterpret_cast<float*>(kept_sums(kM, 0) - threadIdx.x) + j * kAttentionThreads +
           threadIdx.x;
  }

  __device__ __forceinline__ void keep() {
    const int which = threadIdx.x % 4;
#pragma unroll
    for (int j = 0; j < kM; ++j) {
      *kept_scale(j) = which < 2 ? (which == 0 ? top_[j][0] : top_[j][1])
                                 : (which == 2 ? total_[j][0] : total_[j][1]);
#pragma unroll
      for (int n = 0; n < D / 8; ++n) {
        const float (&s)[4] = sums_[j][n];
        *kept_sums(j, n) = make_float4(s[0], s[1], s[2], s[3]);
      }
    }
    clear();
  }

  // The sums so far and those of a chunk, as csrc/cuda/group_decode_attention.cu joins them.
  __device__ __forceinline__ void join() {
    const int first = threadIdx.x % 32 / 4 * 4;
#pragma unroll
    for (int j = 0; j < kM; ++j) {
      const float scale = *kept_scale(j);
      float before[2], now[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float top = __shfl_sync(kAllLanes, scale, first + half);
        const float total = __shfl_sync(kAllLanes, scale, first + 2 + half);
        const float most = max(top, top_[j][half]);
        const float reference = most == -INFINITY ? 0.0f : most * scale_;
        before[half] = ptx::ex2(top * scale_ - reference);
        now[half] = ptx::ex2(top_[j][half] * scale_ - reference);
        top_[j][half] = most;
        total_[j][half] = __fmaf_rn(total, before[half], total_[j][half] * now[half]);
      }
#pragma unroll
      for (int n = 0; n < D / 8; ++n) {
        const float4 kept = *kept_sums(j, n);
        float (&s)[4] = sums_[j][n];
        s[0] = __fmaf_rn(kept.x, before[0], s[0] * now[0]);
        s[1] = __fmaf_rn(kept.y, before[0], s[1] * now[0]);
        s[2] = __fmaf_rn(kept.z, before[1], s[2] * now[1]);
        s[3] = __fmaf_rn(kept.w, before[1], s[3] * now[1]);
      }
    }
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
        check_lengths(a, q.sequence);
        sight = sight_of(a, q.sequence, q.token);
      }
      sights_[in_tile] = sight;
      add(span, a.mask, sight);
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

  __device__ __forceinline__ void load_queries(uint32_t queries) {
    ptx::cp_async_wait<0>();
    __syncthreads();
#pragma unroll
    for (int j = 0; j < kM; ++j) {
#pragma unroll
      for (int k = 0; k < D / 16; ++k) {
        load_left<D>(q_[j][k], queries, warp_row() + 16 * j, 2 * k);
      }
    }
  }

  template <Hides kHides>
  __device__ __forceinline__ void step(const AttentionMask& mask, uint32_t k, uint32_t v,
                                       int slot) {
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
    if constexpr (kHides == Hides::kKeys) seen = hide(mask, slot, s);
    if constexpr (kHides == Hides::kStandIns) seen = hide_refreshed(mask, slot, s);
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
        if constexpr (kHides != Hides::kNothing) {
          b[0] &= even, b[1] &= odd, b[2] &= even, b[3] &= odd;
        }
#pragma unroll
        for (int j = 0; j < kM; ++j) {
          ptx::mma_bf16(sums_[j][2 * d], p[j][i], b[0], b[1]);
          ptx::mma_bf16(sums_[j][2 * d + 1], p[j][i], b[2], b[3]);
        }
      }
    }
  }

  // Scores that a row does not see become -infinity.
  __device__ __forceinline__ uint32_t hide(const AttentionMask& mask, int slot,
                                           float (&s)[kM][8][4]) const {
    const int lane = threadIdx.x % 32;
    const int tau[2] = {key_tau(mask, slot + lane), key_tau(mask, slot + 32 + lane)};
    uint32_t seen = 0;
#pragma unroll
    for (int j = 0; j < kM; ++j) {
      const Sight* sights = sights_ + warp_row() + 16 * j + lane / 4;
      const Sight upper = sights[0], lower = sights[8];
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

  // The same under a refreshed mask. What is seen is found out in a loop: registers are full.
  __device__ __forceinline__ uint32_t hide_refreshed(const AttentionMask& mask, int slot,
                                                     float (&s)[kM][8][4]) const {
    const int lane = threadIdx.x % 32;
    const int steps[2] = {key_steps(mask, slot + lane), key_steps(mask, slot + 32 + lane)};
    uint32_t seen = 0;
#pragma unroll
    for (int j = 0; j < kM; ++j) {
      const Sight* sights = sights_ + warp_row() + 16 * j + lane / 4;
      uint32_t bits = 0;  // 2 n + e of the upper row; 16 more of the lower one
#pragma unroll 4
      for (int i = 0; i < 16; ++i) {
        const int at = i / 2 * 8 + lane % 4 * 2 + i % 2;
        const int own = __shfl_sync(kAllLanes, i < 8 ? steps[0] : steps[1], at % 32);
        if (sees_refreshed(mask, sights[0], slot + at, own)) bits |= 1u << i;
        if (sees_refreshed(mask, sights[8], slot + at, own)) bits |= 1u << (16 + i);
      }
      seen |= bits | bits >> 16;
#pragma unroll
      for (int i = 0; i < 32; ++i) {
        if ((bits >> i & 1) == 0) s[j][i % 16 / 2][i / 16 * 2 + i % 2] = -INFINITY;
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
