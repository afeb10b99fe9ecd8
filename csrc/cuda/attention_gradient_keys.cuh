// dk and dv on tensor cores: a block of 64 keys that goes through the rows of queries. Formulas:
// video_attention_backward.cu.
#pragma once

#include "cuda/attention_gradient.cuh"

namespace rlir::cuda {
namespace {

// 64 keys. Tiles of rows come through two stages: q, dout, and of each row lse, delta, sight.
template <int D>
class KeyGradient {
 public:
  static constexpr int kRows = D == 128 ? 32 : 64;  // at a time: sums of 64 would not fit
  static constexpr uint32_t kKeys = kKeyBlock * D * 2, kQueries = kRows * D * 2;  // bytes
  static constexpr uint32_t kStage = 2 * kQueries + kRows * (8 + sizeof(Sight));
  static constexpr size_t kShared = 2 * kKeys + 2 * kStage;

  __device__ __forceinline__ void run(const AttentionBackward& first,
                                      const AttentionBackward& second, int calls, int part,
                                      int64_t batch, int kv_head, int key, unsigned char* shared) {
    const uint32_t base = ptx::shared_address(shared);
    const int warp_row = threadIdx.x / 32 * 16;
    const KeyPart& keys = first.in.part[part];
    const int length = static_cast<int>(part_length(keys, batch));
    const int64_t sequence = part == 0 ? batch * first.in.group : batch;
    const int slot = key + (part == 0 ? 0 : keys_of(first.in, sequence).first);
    const int tiles = row_tiles(first.in, part);
    const int later_tiles = calls > 1 ? row_tiles(second.in, part) : 0;
    const int steps = key < length ? (tiles + later_tiles) * kPerTile : 0;
    const auto span_at = [&](int i) {
      const bool later = i >= tiles * kPerTile;
      const int tile = i / kPerTile - (later ? tiles : 0);
      const GradientRows& rows = (later ? second : first).rows[part];
      return static_cast<const Span*>(rows.spans)[batch * (later ? later_tiles : tiles) + tile];
    };
    const auto next = [&](int i) {  // the next rows that see something of the block
      while (i < steps && !span_at(i).touches(slot)) ++i;
      return i;
    };
    const auto copy = [&](int i, int stage) {
      const bool later = i >= tiles * kPerTile;
      const int row = (i - (later ? tiles * kPerTile : 0)) * kRows;
      copy_rows(later ? second : first, part, batch, kv_head, row, (later ? later_tiles : tiles),
                base + 2 * kKeys + stage * kStage);
    };
    float dk[D / 8][4] = {}, dv[D / 8][4] = {};
    int i = next(0), stage = 0;
    if (i < steps) {
      copy_keys<D, kKeyBlock>(base, head_of(keys.k, batch, kv_head), keys.k.token, key, length);
      copy_keys<D, kKeyBlock>(base + kKeys, head_of(keys.v, batch, kv_head), keys.v.token, key,
                              length);
      copy(i, 0);
    }
    ptx::cp_async_commit();
#pragma unroll 1
    while (i < steps) {
      ptx::cp_async_wait<0>();
#if !defined(RLIR_FAULT_KEYS_BARRIER)
      __syncthreads();
#endif
      const int following = next(i + 1);
      if (following < steps) copy(following, stage ^ 1);
      ptx::cp_async_commit();
      const uint32_t at = 2 * kKeys + stage * kStage;
      const Span span = span_at(i);
      const Attention& a = (i >= tiles * kPerTile ? second : first).in;
      if (span.covers(slot)) {
        step<false>(a, base, base + at, shared + at, slot, dk, dv);
      } else {
        step<true>(a, base, base + at, shared + at, slot, dk, dv);
      }
      i = following;
      stage ^= 1;
    }
    ptx::cp_async_wait<0>();
    const auto place = [&](int row) {
      row += key;
      const int64_t at = ((batch * keys.slots + row) * first.in.kv_heads + kv_head) * D;
      return row < keys.slots ? at : int64_t{-1};
    };
    // A warp's keys are its own: nobody else reads their rows. Beyond the length are zeros.
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const bool there =
          key + warp_row + 8 * half + static_cast<int>(threadIdx.x % 32 / 4) < length;
#pragma unroll
      for (int n = 0; n < D / 8; ++n) {
        if (there) continue;
        dk[n][2 * half] = dk[n][2 * half + 1] = dv[n][2 * half] = dv[n][2 * half + 1] = 0.0f;
      }
    }
    __syncwarp();
    store_rows<D>(shared, dk, static_cast<float>(first.in.scale), first.dk[part], place);
    store_rows<D>(shared + kKeys, dv, 1.0f, first.dv[part], place);
  }

 private:
  static constexpr int kPerTile = 64 / kRows;

  static __device__ __forceinline__ int row_tiles(const Attention& a, int part) {
    const int64_t rows = (part == 0 ? a.group : 1) * a.tokens * (a.heads / a.kv_heads);
    return static_cast<int>((rows + 63) / 64);
  }

  static __device__ __forceinline__ void copy_rows(const AttentionBackward& g, int part,
                                                   int64_t batch, int kv_head, int row, int tiles,
                                                   uint32_t to) {
    const Attention& a = g.in;
    const GradientRows& from = g.rows[part];
    const int64_t members = part == 0 ? a.group : 1;
    const int rows = static_cast<int>(members * a.tokens * (a.heads / a.kv_heads));
    copy_queries<D, kRows>(to, a, a.q, batch * members, kv_head, row, rows);
    copy_queries<D, kRows>(to + kQueries, a, g.grad_out, batch * members, kv_head, row, rows);
    const int64_t padded = static_cast<int64_t>(tiles) * 64;
    const int64_t numbers = (batch * a.kv_heads + kv_head) * padded + row;
    constexpr int kNumbers = kRows / 4;  // chunks of lse, and of delta; then a chunk a sight
    int i = threadIdx.x;
    to += 2 * kQueries + i * 16;
    if (i < kNumbers) {
      ptx::cp_async_16(to, from.lse + numbers + 4 * i);
    } else if (i < 2 * kNumbers) {
      ptx::cp_async_16(to, from.delta + numbers + 4 * (i - kNumbers));
    } else if (i < 2 * kNumbers + kRows) {
      i -= 2 * kNumbers;
      ptx::cp_async_16(to, static_cast<const Sight*>(from.sights) + batch * padded + row + i);
    }
  }

  template <bool kMasked>
  static __device__ __forceinline__ void step(const Attention& a, uint32_t keys, uint32_t rows,
                                              const unsigned char* stage, int slot,
                                              float (&dk)[D / 8][4], float (&dv)[D / 8][4]) {
    constexpr int kPairs = kRows / 16;
    const int lane = threadIdx.x % 32, warp_row = threadIdx.x / 32 * 16;
    const float* lse = reinterpret_cast<const float*>(stage + 2 * kQueries);
    const float* delta = lse + kRows;
    const Sight* sights = reinterpret_cast<const Sight*>(delta + kRows);
    const float scale = log2_scale(a);
    float s[2 * kPairs][4] = {};
    multiply(s, keys, rows);
    uint32_t seen = kMasked ? 0 : kAllLanes, hidden[2] = {0, 0};
    int tau[2] = {};
    if constexpr (kMasked) {
      tau[0] = key_tau(a.mask, slot + warp_row + lane / 4);
      tau[1] = key_tau(a.mask, slot + warp_row + 8 + lane / 4);
    }
    uint32_t p[kPairs][4];
#pragma unroll
    for (int n = 0; n < 2 * kPairs; ++n) {
      const int at = 8 * n + lane % 4 * 2;
      const float2 other = *reinterpret_cast<const float2*>(lse + at);
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        Sight sight{};
        if constexpr (kMasked) sight = sights[at + e];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float& x = s[n][2 * half + e];
          x = ptx::ex2(__fmaf_rn(x, scale, e == 0 ? -other.x : -other.y));
          if constexpr (kMasked) {
            const int key = slot + warp_row + 8 * half + lane / 4;
            if (sees(sight, key, tau[half])) {
              seen |= 1u << (2 * n + e);
            } else {
              x = 0.0f;
              hidden[half] |= 1u << (2 * n + e);
            }
          }
        }
      }
    }
    if constexpr (kMasked) {
      if (a.mask.kind == MaskKind::kRefreshed) seen = hide(a.mask, slot, sights, s, hidden);
    }
#pragma unroll
    for (int n = 0; n < 2 * kPairs; ++n) {
      p[n / 2][n % 2 * 2] = ptx::pack_bf16(s[n][0], s[n][1]);
      p[n / 2][n % 2 * 2 + 1] = ptx::pack_bf16(s[n][2], s[n][3]);
    }
    if constexpr (kMasked) seen = over_rows(seen);
    add_product<kMasked>(dv, p, rows + kQueries, seen);
    float dp[2 * kPairs][4] = {};
    multiply(dp, keys + kKeys, rows + kQueries);
#pragma unroll
    for (int n = 0; n < 2 * kPairs; ++n) {
      const float2 other = *reinterpret_cast<const float2*>(delta + 8 * n + lane % 4 * 2);
#pragma unroll
      for (int e = 0; e < 2; ++e) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float& x = s[n][2 * half + e];
          x = x * (dp[n][2 * half + e] - (e == 0 ? other.x : other.y));
          if (kMasked && (hidden[half] >> (2 * n + e) & 1) != 0) x = 0.0f;
        }
      }
      p[n / 2][n % 2 * 2] = ptx::pack_bf16(s[n][0], s[n][1]);
      p[n / 2][n % 2 * 2 + 1] = ptx::pack_bf16(s[n][2], s[n][3]);
    }
    add_product<kMasked>(dk, p, rows, seen);
  }

  // The rest of what a refreshed mask hides: becomes 0 in x. Returns what is seen of the rows.
  static __device__ __forceinline__ uint32_t hide(const AttentionMask& mask, int slot,
                                                  const Sight* sights, float (&x)[kRows / 8][4],
                                                  uint32_t (&hidden)[2]) {
    const int lane = threadIdx.x % 32, key = slot + threadIdx.x / 32 * 16 + lane / 4;
    const int steps[2] = {key_steps(mask, key), key_steps(mask, key + 8)};
    uint32_t seen = 0;
#pragma unroll
    for (int n = 0; n < kRows / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const Sight sight = sights[8 * n + lane % 4 * 2 + e];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          if (sees_refreshed(mask, sight, key + 8 * half, steps[half])) {
            seen |= 1u << (2 * n + e);
          } else {
            x[n][2 * half + e] = 0.0f;
            hidden[half] |= 1u << (2 * n + e);
          }
        }
      }
    }
    return seen;
  }

  // s += keys rows^T, of the warp's 16 keys.
  static __device__ __forceinline__ void multiply(float (&s)[kRows / 8][4], uint32_t keys,
                                                  uint32_t rows) {
    const int warp_row = threadIdx.x / 32 * 16;
#pragma unroll
    for (int d = 0; d < D / 16; ++d) {
      uint32_t x[4];
      load_left<D>(x, keys, warp_row, 2 * d);
#pragma unroll
      for (int n = 0; n < kRows / 16; ++n) {
        uint32_t b[4];
        load_right<D>(b, rows, 16 * n, 2 * d);
        ptx::mma_bf16(s[2 * n], x, b[0], b[1]);
        ptx::mma_bf16(s[2 * n + 1], x, b[2], b[3]);
      }
    }
  }

  // sum += p rows; those that `seen` does not name are zeros.
  template <bool kMasked>
  static __device__ __forceinline__ void add_product(float (&sum)[D / 8][4],
                                                     const uint32_t (&p)[kRows / 16][4],
                                                     uint32_t rows, uint32_t seen) {
#pragma unroll
    for (int i = 0; i < kRows / 16; ++i) {
      const uint32_t even = pair_mask(seen >> 4 * i), odd = pair_mask(seen >> (4 * i + 2));
#pragma unroll
      for (int d = 0; d < D / 16; ++d) {
        uint32_t b[4];
        load_across<D>(b, rows, 16 * i, 2 * d);
        if constexpr (kMasked) b[0] &= even, b[1] &= odd, b[2] &= even, b[3] &= odd;
        ptx::mma_bf16(sum[2 * d], p[i], b[0], b[1]);
        ptx::mma_bf16(sum[2 * d + 1], p[i], b[2], b[3]);
      }
    }
  }
};

}  // namespace
}  // namespace rlir::cuda
