// A tile of queries against keys in float32, in the order of sums of cpu/video_attention.h: blocks
// of 128 slots of the whole sequence, whichever part a key is in. 256 threads; a warp has four
// rows, a lane four neighbouring keys of the scores and every 32nd column of the output.
#pragma once

#include "core/exp.h"
#include "core/exp2.h"
#include "cuda/attention.cuh"

namespace rlir::cuda {
namespace {

constexpr int kSimtThreads = 256, kSimtRows = 32, kSimtKeys = 128, kSimtChunk = 32;

template <int D>
class SimtTile {
 public:
  static constexpr int kKeyStride = kSimtKeys + 4;  // floats; rows of keys and of probabilities
  static constexpr int kOther =
      kSimtChunk * (kKeyStride > D ? kKeyStride : D);  // a chunk of keys, or of values
  static constexpr size_t kShared =
      (kSimtRows * D + kOther + kSimtRows * kKeyStride) * sizeof(float);

  __device__ __forceinline__ void run(const AttentionForward& f, int64_t sequence, int kv_head,
                                      int first_row, float* shared) {
    const Attention& a = f.in;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int rows = static_cast<int>(a.tokens * (a.heads / a.kv_heads));
    float *q = shared, *other = q + kSimtRows * D, *p = other + kOther;
    keys_ = keys_of(a, sequence);
    scale_ = log2_scale(a);
    Sight sight[4];
    unsigned low = kNever, high = 0;
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int row = first_row + 4 * warp + r;
      sight[r] = {kNever, 0, 0, 0};
      if (row < rows) {
        const Query query = query_of(a, sequence, kv_head, row);
        check_lengths(a, query.sequence);
        sight[r] = sight_of(a, query.sequence, query.token);
        const float* from = static_cast<const float*>(a.q.data) + offset(a.q, query);
        for (int d = lane; d < D; d += 32) q[(4 * warp + r) * D + d] = from[d];
      } else {
        for (int d = lane; d < D; d += 32) q[(4 * warp + r) * D + d] = 0.0f;
      }
      low = min(low, static_cast<unsigned>(sight[r].low));
      high = max(high, static_cast<unsigned>(sight[r].high));
    }
    // Blocks of the tile: the same for all warps, who share the keys.
    unsigned* spans = reinterpret_cast<unsigned*>(p);
    if (lane == 0) spans[2 * warp] = low, spans[2 * warp + 1] = high;
    __syncthreads();
    for (int w = 0; w < kSimtThreads / 32; ++w) {
      low = min(low, spans[2 * w]);
      high = max(high, spans[2 * w + 1]);
    }
    __syncthreads();
    float sums[4][D / 32] = {}, top[4], total[4] = {};
#pragma unroll
    for (int r = 0; r < 4; ++r) top[r] = -INFINITY;
#pragma unroll 1
    for (unsigned slot = low / kSimtKeys * kSimtKeys; slot < high; slot += kSimtKeys) {
      float s[4][4] = {};
      scores(a, sequence, kv_head, static_cast<int>(slot), q, other, s);
      softmax(a, static_cast<int>(slot), sight, s, p, top, total, sums);
      add_values(a, sequence, kv_head, static_cast<int>(slot), p, other, sums);
    }
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int row = first_row + 4 * warp + r;
      if (row >= rows) continue;
      const int64_t at = flat(a, query_of(a, sequence, kv_head, row));
      const float inverse = 1.0f / total[r];
      float* out = static_cast<float*>(f.out) + at * D;
#pragma unroll
      for (int d = 0; d < D / 32; ++d) {
        out[lane + 32 * d] = total[r] != 0.0f ? sums[r][d] * inverse : 0.0f;
      }
      if (f.lse != nullptr && lane == 0) {
        const double natural = 0x1.62e42fefa39efp-1 * static_cast<double>(top[r]);
        f.lse[at] = total[r] != 0.0f
                        ? static_cast<float>(natural + log(static_cast<double>(total[r])))
                        : -INFINITY;
      }
    }
  }

 private:
  // The address of a slot's key or value; null beyond the end.
  __device__ __forceinline__ const float* at_slot(const Attention& a, int64_t sequence, int kv_head,
                                                  int slot, bool value) const {
    if (slot >= keys_.all) return nullptr;
    const int p = slot < keys_.first ? 0 : 1;
    const Heads& x = value ? a.part[p].v : a.part[p].k;
    const int64_t batch = p == 0 ? sequence / a.group : sequence;
    return static_cast<const float*>(x.data) + batch * x.batch + kv_head * x.head +
           static_cast<int64_t>(p == 0 ? slot : slot - keys_.first) * x.token;
  }

  // s += q k over 32 columns at a time, which lie transposed in `other`.
  __device__ __forceinline__ void scores(const Attention& a, int64_t sequence, int kv_head,
                                         int slot, const float* q, float* other,
                                         float (&s)[4][4]) const {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll 1
    for (int d = 0; d < D; d += kSimtChunk) {
      __syncthreads();
#pragma unroll 1
      for (int key = warp; key < kSimtKeys; key += kSimtThreads / 32) {
        const float* from = at_slot(a, sequence, kv_head, slot + key, false);
        other[lane * kKeyStride + key] = from != nullptr ? from[d + lane] : 0.0f;
      }
      __syncthreads();
#pragma unroll 4
      for (int i = 0; i < kSimtChunk; ++i) {
        const float4 k = *reinterpret_cast<const float4*>(other + i * kKeyStride + 4 * lane);
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const float x = q[(4 * warp + r) * D + d + i];
          s[r][0] = __fmaf_rn(x, k.x, s[r][0]);
          s[r][1] = __fmaf_rn(x, k.y, s[r][1]);
          s[r][2] = __fmaf_rn(x, k.z, s[r][2]);
          s[r][3] = __fmaf_rn(x, k.w, s[r][3]);
        }
      }
    }
  }

  __device__ __forceinline__ void softmax(const Attention& a, int slot, const Sight (&sight)[4],
                                          float (&s)[4][4], float* p, float (&top)[4],
                                          float (&total)[4], float (&sums)[4][D / 32]) const {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int key = slot + 4 * lane + e, tau = key_tau(a.mask, key);
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        if (!sees(sight[r], key, tau)) s[r][e] = -INFINITY;
      }
    }
    if (a.mask.kind == MaskKind::kRefreshed) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int key = slot + 4 * lane + e, steps = key_steps(a.mask, key);
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          if (!sees_refreshed(a.mask, sight[r], key, steps)) s[r][e] = -INFINITY;
        }
      }
    }
    float factor[4];
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      float most = max(max(s[r][0], s[r][1]), max(s[r][2], s[r][3]));
#pragma unroll
      for (int lanes = 16; lanes > 0; lanes /= 2) {
        most = max(most, __shfl_xor_sync(kAllLanes, most, lanes));
      }
      most = max(top[r], most * scale_);
      const float reference = most == -INFINITY ? 0.0f : most;
      factor[r] = top[r] == most ? 1.0f : exp2_weight<6>(top[r] - reference);
      top[r] = most;
      float e[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) e[i] = exp2_weight<6>(__fmaf_rn(s[r][i], scale_, -reference));
      *reinterpret_cast<float4*>(p + (4 * warp + r) * kKeyStride + 4 * lane) =
          make_float4(e[0], e[1], e[2], e[3]);
    }
    __syncwarp();
    // Lane 16 r + i: accumulators i of rows r and r + 2.
    const float* mine = p + (4 * warp + lane / 16) * kKeyStride + lane % 16;
    float sum[2] = {};
#pragma unroll
    for (int k = 0; k < kSimtKeys; k += 16) {
      sum[0] = sum[0] + mine[k];
      sum[1] = sum[1] + mine[k + 2 * kKeyStride];
    }
#pragma unroll
    for (int lanes = 8; lanes > 0; lanes /= 2) {
      sum[0] = sum[0] + __shfl_xor_sync(kAllLanes, sum[0], lanes);
      sum[1] = sum[1] + __shfl_xor_sync(kAllLanes, sum[1], lanes);
    }
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const float added = __shfl_sync(kAllLanes, sum[r / 2], 16 * (r % 2));
      total[r] = __fmaf_rn(total[r], factor[r], added);
#pragma unroll
      for (int d = 0; d < D / 32; ++d) sums[r][d] = sums[r][d] * factor[r];
    }
  }

  __device__ __forceinline__ void add_values(const Attention& a, int64_t sequence, int kv_head,
                                             int slot, const float* p, float* other,
                                             float (&sums)[4][D / 32]) const {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll 1
    for (int chunk = 0; chunk < kSimtKeys; chunk += kSimtChunk) {
      __syncthreads();
#pragma unroll 1
      for (int key = warp; key < kSimtChunk; key += kSimtThreads / 32) {
        const float* from = at_slot(a, sequence, kv_head, slot + chunk + key, true);
#pragma unroll
        for (int d = lane; d < D; d += 32) other[key * D + d] = from != nullptr ? from[d] : 0.0f;
      }
      __syncthreads();
#pragma unroll 4
      for (int key = 0; key < kSimtChunk; ++key) {
        float v[D / 32];
#pragma unroll
        for (int d = 0; d < D / 32; ++d) v[d] = other[key * D + lane + 32 * d];
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const float e = p[(4 * warp + r) * kKeyStride + chunk + key];
#pragma unroll
          for (int d = 0; d < D / 32; ++d) {  // the value of a key that is not seen may be anything
            sums[r][d] = e != 0.0f ? __fmaf_rn(e, v[d], sums[r][d]) : sums[r][d];
          }
        }
      }
    }
  }

  KeyCount keys_;
  float scale_;
};

}  // namespace
}  // namespace rlir::cuda
