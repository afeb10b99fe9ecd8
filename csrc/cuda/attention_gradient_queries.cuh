// dq on tensor cores: a tile of 64 rows of queries that goes through the keys. Formulas:
// video_attention_backward.cu.
#pragma once

#include "cuda/attention_gradient.cuh"

namespace rlir::cuda {
namespace {

// 64 rows of queries. Their q and dout stay in registers as left operands.
template <int D, int kParts>
class QueryGradient {
 public:
  static constexpr uint32_t kTile = kKeyBlock * D * 2;  // bytes; a stage has K and V
  static constexpr size_t kShared = 4 * kTile + sizeof(Plan);
  static constexpr int kAtATime = D == 128 ? 32 : 64;  // keys: scores of 64 would not fit

  __device__ __forceinline__ void run(const AttentionBackward& g, int64_t sequence, int kv_head,
                                      int tile, int tiles, unsigned char* shared) {
    const Attention& a = g.in;
    const uint32_t base = ptx::shared_address(shared);
    Plan& plan = *reinterpret_cast<Plan*>(shared + 4 * kTile);
    const GradientRows& from = g.rows[a.parts - 1];  // these rows are of one sequence
    const int rows = static_cast<int>(a.tokens * (a.heads / a.kv_heads));
    const Span span = static_cast<const Span*>(from.spans)[sequence * tiles + tile];
    const int lane = threadIdx.x % 32, warp_row = threadIdx.x / 32 * 16;
    if (threadIdx.x == 0) plan = plan_of(a, sequence, span, 0, kNever);
    __syncthreads();
    float dq[D / 8][4] = {};
    Sight sight[2];
    float lse[2], delta[2];
    const int64_t padded = static_cast<int64_t>(tiles) * 64;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = tile * 64 + warp_row + 8 * half + lane / 4;
      const int64_t at = (sequence * a.kv_heads + kv_head) * padded + row;
      sight[half] = static_cast<const Sight*>(from.sights)[sequence * padded + row];
      lse[half] = from.lse[at];
      delta[half] = from.delta[at];
    }
    int block = plan.begin;
    if (block < plan.end) {
      const auto copy = [&](int i) {
        const uint32_t to = base + i % 2 * 2 * kTile;
        copy_block<D, kParts>(to, a, false, sequence, kv_head, i * kKeyBlock, plan.keys);
        copy_block<D, kParts>(to + kTile, a, true, sequence, kv_head, i * kKeyBlock, plan.keys);
      };
      const uint32_t rows_at = base + (block + 1) % 2 * 2 * kTile;
      copy_queries<D, 64>(rows_at, a, a.q, sequence, kv_head, tile * 64, rows);
      copy_queries<D, 64>(rows_at + kTile, a, g.grad_out, sequence, kv_head, tile * 64, rows);
      copy(block);
      ptx::cp_async_commit();
      ptx::cp_async_wait<0>();
      __syncthreads();
      uint32_t q[D / 16][4], grad[D / 16][4];
#pragma unroll
      for (int d = 0; d < D / 16; ++d) {
        load_left<D>(q[d], rows_at, warp_row, 2 * d);
        load_left<D>(grad[d], rows_at + kTile, warp_row, 2 * d);
      }
      const float scale = log2_scale(a);
#pragma unroll 1
      for (; block < plan.end; ++block) {
        ptx::cp_async_wait<0>();
#if !defined(RLIR_FAULT_QUERIES_BARRIER)
        __syncthreads();
#endif
        if (block + 1 < plan.end) copy(block + 1);
        ptx::cp_async_commit();
        const int slot = block * kKeyBlock;
        if (!span.touches(slot)) continue;
        const uint32_t k = base + block % 2 * 2 * kTile;
        if (span.covers(slot)) {
          step<false>(a.mask, k, slot, scale, q, grad, sight, lse, delta, dq);
        } else {
          step<true>(a.mask, k, slot, scale, q, grad, sight, lse, delta, dq);
        }
      }
      ptx::cp_async_wait<0>();
      __syncthreads();  // the stages take rows of the gradient
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int n = 0; n < D / 8; ++n) {
        if (sight[half].low == kNever) dq[n][2 * half] = dq[n][2 * half + 1] = 0.0f;
      }
    }
    store_rows<D>(shared, dq, static_cast<float>(a.scale), g.dq, [&](int row) {
      row += tile * 64;
      return row < rows ? flat(a, query_of(a, sequence, kv_head, row)) * D : int64_t{-1};
    });
  }

 private:
  template <bool kMasked>
  static __device__ __forceinline__ void step(const AttentionMask& mask, uint32_t k, int slot,
                                              float scale, const uint32_t (&q)[D / 16][4],
                                              const uint32_t (&grad)[D / 16][4],
                                              const Sight (&sight)[2], const float (&lse)[2],
                                              const float (&delta)[2], float (&dq)[D / 8][4]) {
    const int lane = threadIdx.x % 32;
#pragma unroll 1
    for (int first = 0; first < kKeyBlock; first += kAtATime) {
      constexpr int kTiles = kAtATime / 8;
      float s[kTiles][4] = {}, dp[kTiles][4] = {};
#pragma unroll
      for (int d = 0; d < D / 16; ++d) {
#pragma unroll
        for (int n = 0; n < kTiles / 2; ++n) {
          uint32_t b[4];
          load_right<D>(b, k, first + 16 * n, 2 * d);
          ptx::mma_bf16(s[2 * n], q[d], b[0], b[1]);
          ptx::mma_bf16(s[2 * n + 1], q[d], b[2], b[3]);
          load_right<D>(b, k + kTile, first + 16 * n, 2 * d);
          ptx::mma_bf16(dp[2 * n], grad[d], b[0], b[1]);
          ptx::mma_bf16(dp[2 * n + 1], grad[d], b[2], b[3]);
        }
      }
      uint32_t seen = kMasked ? 0 : kAllLanes;
      uint32_t ds[kTiles / 2][4];
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        const int at = slot + first + 8 * n + lane % 4 * 2;
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          int tau = 0;
          if constexpr (kMasked) tau = key_tau(mask, at + e);
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            float& x = s[n][2 * half + e];
            const float p = ptx::ex2(__fmaf_rn(x, scale, -lse[half]));
            x = p * (dp[n][2 * half + e] - delta[half]);
            if constexpr (kMasked) {
              const bool visible = sees(sight[half], at + e, tau);
              if (!visible) x = 0.0f;
              if (visible) seen |= 1u << (2 * n + e);
            }
          }
        }
      }
      if constexpr (kMasked) {
        if (mask.kind == MaskKind::kRefreshed) seen = hide(mask, slot + first, sight, s);
      }
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        ds[n / 2][n % 2 * 2] = ptx::pack_bf16(s[n][0], s[n][1]);
        ds[n / 2][n % 2 * 2 + 1] = ptx::pack_bf16(s[n][2], s[n][3]);
      }
      if constexpr (kMasked) seen = over_rows(seen);
#pragma unroll
      for (int i = 0; i < kTiles / 2; ++i) {
        const uint32_t even = pair_mask(seen >> 4 * i), odd = pair_mask(seen >> (4 * i + 2));
#pragma unroll
        for (int d = 0; d < D / 16; ++d) {
          uint32_t b[4];
          load_across<D>(b, k, first + 16 * i, 2 * d);
          if constexpr (kMasked) b[0] &= even, b[1] &= odd, b[2] &= even, b[3] &= odd;
          ptx::mma_bf16(dq[2 * d], ds[i], b[0], b[1]);
          ptx::mma_bf16(dq[2 * d + 1], ds[i], b[2], b[3]);
        }
      }
    }
  }

  // The rest of what a refreshed mask hides: becomes 0 in x. Returns what is seen of the keys.
  static __device__ __forceinline__ uint32_t hide(const AttentionMask& mask, int slot,
                                                  const Sight (&sight)[2],
                                                  float (&x)[kAtATime / 8][4]) {
    uint32_t seen = 0;
#pragma unroll
    for (int n = 0; n < kAtATime / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int key = slot + 8 * n + static_cast<int>(threadIdx.x % 4) * 2 + e;
        const int steps = key_steps(mask, key);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          if (sees_refreshed(mask, sight[half], key, steps)) {
            seen |= 1u << (2 * n + e);
          } else {
            x[n][2 * half + e] = 0.0f;
          }
        }
      }
    }
    return seen;
  }
};

}  // namespace
}  // namespace rlir::cuda
