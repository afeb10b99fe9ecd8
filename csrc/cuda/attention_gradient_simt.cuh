// Gradients in float32, by tiles of 32 rows of queries and 32 keys and 256 threads: a thread has
// 2 x 2 scores and D / 8 sums of a column. Formulas and the order of kernels as on tensor cores
// (video_attention_backward.cu); a sum is made of chains over 32 rows or keys, added up in order.
#pragma once

#include "core/exp2.h"
#include "cuda/attention_gradient.cuh"
#include "cuda/attention_simt.cuh"

namespace rlir::cuda {
namespace {

constexpr int kSimtTile = 32;

template <int D>
class SimtGradient {
 public:
  static constexpr int kStride = D + 1, kScoreStride = kSimtTile + 1;  // floats
  static constexpr size_t kShared =
      (4 * kSimtTile * kStride + 2 * kSimtTile * kScoreStride + 2 * kSimtTile) * sizeof(float) +
      kSimtTile * sizeof(Sight);

  // Rows tile * 32 .. of one sequence, through its keys.
  __device__ __forceinline__ void queries(const AttentionBackward& g, int64_t sequence, int kv_head,
                                          int tile, float* shared) {
    const Attention& a = g.in;
    place(shared);
    const int part = a.parts - 1;
    const int rows = static_cast<int>(a.tokens * (a.heads / a.kv_heads)), tiles = (rows + 63) / 64;
    const Span span = static_cast<const Span*>(g.rows[part].spans)[sequence * tiles + tile / 2];
    const KeyCount keys = keys_of(a, sequence);
    load_rows(g, part, sequence, kv_head, tile * kSimtTile, tiles);
    float dq[kSums] = {};
    const int high = static_cast<int>(span.high);
#pragma unroll 1
    for (int slot = static_cast<int>(span.low) / kSimtTile * kSimtTile; slot < high;
         slot += kSimtTile) {
      __syncthreads();
      load_keys(a, sequence / a.group, sequence, kv_head, slot, keys);
      __syncthreads();
      scores(a, slot, keys.all);
      __syncthreads();
      float chain[kSums] = {};
#pragma unroll 1
      for (int key = 0; key < kSimtTile; ++key) {
        const float k = k_[key * kStride + column()];
#pragma unroll
        for (int r = 0; r < kSums; ++r) {
          const float x = ds_[(first() + r) * kScoreStride + key];
          chain[r] = x != 0.0f ? __fmaf_rn(x, k, chain[r]) : chain[r];
        }
      }
#pragma unroll
      for (int r = 0; r < kSums; ++r) dq[r] = dq[r] + chain[r];
    }
#pragma unroll
    for (int r = 0; r < kSums; ++r) {
      const int row = tile * kSimtTile + first() + r;
      if (row >= rows) continue;
      const int64_t at = flat(a, query_of(a, sequence, kv_head, row)) * D + column();
      static_cast<float*>(g.dq)[at] = dq[r] * static_cast<float>(a.scale);
    }
  }

  // Keys `key` .. of a part, through the queries of `calls` calls.
  __device__ __forceinline__ void keys(const AttentionBackward& g, const AttentionBackward& other,
                                       int calls, int part, int64_t batch, int kv_head, int key,
                                       float* shared) {
    const Attention& a = g.in;
    place(shared);
    const int64_t sequence = part == 0 ? batch * a.group : batch;
    const KeyCount all = keys_of(a, sequence);
    const int before = part == 0 ? 0 : all.first, end = part == 0 ? all.first : all.all;
    const int slot = before + key;
    float dk[kSums] = {}, dv[kSums] = {};
    load_keys(a, sequence / a.group, sequence, kv_head, slot, {all.first, end});
#pragma unroll 1
    for (int call = 0; call < calls && slot < end; ++call) {
      const AttentionBackward& from = call == 0 ? g : other;
      const Attention& in = from.in;
      const int64_t members = part == 0 ? in.group : 1;
      const int rows = static_cast<int>(members * in.tokens * (in.heads / in.kv_heads));
      const int tiles = (rows + 63) / 64;
#pragma unroll 1
      for (int tile = 0; tile < 2 * tiles; ++tile) {
        const Span* spans = static_cast<const Span*>(from.rows[part].spans);
        if (!spans[batch * tiles + tile / 2].touches(slot)) continue;
        __syncthreads();
        load_rows(from, part, batch, kv_head, tile * kSimtTile, tiles);
        __syncthreads();
        scores(in, slot, end);
        __syncthreads();
        float k_chain[kSums] = {}, v_chain[kSums] = {};
#pragma unroll 1
        for (int row = 0; row < kSimtTile; ++row) {
          const float q = q_[row * kStride + column()], grad = grad_[row * kStride + column()];
#pragma unroll
          for (int i = 0; i < kSums; ++i) {
            const float p = p_[row * kScoreStride + first() + i];
            const float ds = ds_[row * kScoreStride + first() + i];
            v_chain[i] = p != 0.0f ? __fmaf_rn(p, grad, v_chain[i]) : v_chain[i];
            k_chain[i] = ds != 0.0f ? __fmaf_rn(ds, q, k_chain[i]) : k_chain[i];
          }
        }
#pragma unroll
        for (int i = 0; i < kSums; ++i) {
          dk[i] = dk[i] + k_chain[i];
          dv[i] = dv[i] + v_chain[i];
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      const int row = key + first() + i;
      if (row >= a.part[part].slots) continue;
      const int64_t at = ((batch * a.part[part].slots + row) * a.kv_heads + kv_head) * D + column();
      static_cast<float*>(g.dk[part])[at] = dk[i] * static_cast<float>(a.scale);
      static_cast<float*>(g.dv[part])[at] = dv[i];
    }
  }

 private:
  static constexpr int kSums = kSimtTile * D / kSimtThreads;

  // A thread's column, and the first of its rows, in sums.
  static __device__ __forceinline__ int column() { return threadIdx.x % D; }
  static __device__ __forceinline__ int first() { return threadIdx.x / D * kSums; }

  __device__ __forceinline__ void place(float* shared) {
    sights_ = reinterpret_cast<Sight*>(shared);
    lse_ = shared + kSimtTile * sizeof(Sight) / sizeof(float);
    delta_ = lse_ + kSimtTile;
    q_ = delta_ + kSimtTile;
    grad_ = q_ + kSimtTile * kStride;
    k_ = grad_ + kSimtTile * kStride;
    v_ = k_ + kSimtTile * kStride;
    p_ = v_ + kSimtTile * kStride;
    ds_ = p_ + kSimtTile * kScoreStride;
  }

  __device__ __forceinline__ void load_rows(const AttentionBackward& g, int part, int64_t batch,
                                            int kv_head, int first_row, int tiles) {
    const Attention& a = g.in;
    const GradientRows& from = g.rows[part];
    const int64_t members = part == 0 ? a.group : 1, padded = static_cast<int64_t>(tiles) * 64;
    const int rows = static_cast<int>(members * a.tokens * (a.heads / a.kv_heads));
    if (threadIdx.x < kSimtTile) {
      const int64_t row = first_row + static_cast<int>(threadIdx.x);
      const int64_t at = (batch * a.kv_heads + kv_head) * padded + row;
      lse_[threadIdx.x] = from.lse[at];
      delta_[threadIdx.x] = from.delta[at];
      sights_[threadIdx.x] = static_cast<const Sight*>(from.sights)[batch * padded + row];
    }
#pragma unroll 1
    for (int row = threadIdx.x / 32; row < kSimtTile; row += kSimtThreads / 32) {
      const bool there = first_row + row < rows;
      const float *q = nullptr, *grad = nullptr;
      if (there) {
        const Query query = query_of(a, batch * members, kv_head, first_row + row);
        q = static_cast<const float*>(a.q.data) + offset(a.q, query);
        grad = static_cast<const float*>(g.grad_out.data) + offset(g.grad_out, query);
      }
#pragma unroll
      for (int d = threadIdx.x % 32; d < D; d += 32) {
        q_[row * kStride + d] = there ? q[d] : 0.0f;
        grad_[row * kStride + d] = there ? grad[d] : 0.0f;
      }
    }
  }

  __device__ __forceinline__ void load_keys(const Attention& a, int64_t batch, int64_t sequence,
                                            int kv_head, int slot, const KeyCount& keys) {
#pragma unroll 1
    for (int key = threadIdx.x / 32; key < kSimtTile; key += kSimtThreads / 32) {
      const int at = slot + key, part = at < keys.first ? 0 : 1;
      const bool there = at < keys.all;
      const float *k = nullptr, *v = nullptr;
      if (there) {
        const KeyPart& from = a.part[part];
        const int64_t n = part == 0 ? batch : sequence, i = part == 0 ? at : at - keys.first;
        k = static_cast<const float*>(from.k.data) + n * from.k.batch + i * from.k.token +
            kv_head * static_cast<int64_t>(from.k.head);
        v = static_cast<const float*>(from.v.data) + n * from.v.batch + i * from.v.token +
            kv_head * static_cast<int64_t>(from.v.head);
      }
#pragma unroll
      for (int d = threadIdx.x % 32; d < D; d += 32) {
        k_[key * kStride + d] = there ? k[d] : 0.0f;
        v_[key * kStride + d] = there ? v[d] : 0.0f;
      }
    }
  }

  // P and dS of rows 2 y, 2 y + 1 and keys x, x + 16.
  __device__ __forceinline__ void scores(const Attention& a, int slot, int end) const {
    const int y = threadIdx.x / 16 * 2, x = threadIdx.x % 16;
    float s[2][2] = {}, dp[2][2] = {};
#pragma unroll 4
    for (int d = 0; d < D; ++d) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float q = q_[(y + r) * kStride + d], grad = grad_[(y + r) * kStride + d];
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          s[r][c] = __fmaf_rn(q, k_[(x + 16 * c) * kStride + d], s[r][c]);
          dp[r][c] = __fmaf_rn(grad, v_[(x + 16 * c) * kStride + d], dp[r][c]);
        }
      }
    }
    const float scale = log2_scale(a);
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int key = slot + x + 16 * c, tau = key_tau(a.mask, key);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const bool visible = sees(sights_[y + r], key, tau) && key < end;
        const float p = exp2_weight<6>(__fmaf_rn(s[r][c], scale, -lse_[y + r]));
        const int at = (y + r) * kScoreStride + x + 16 * c;
        p_[at] = visible ? p : 0.0f;
        ds_[at] = visible ? p * (dp[r][c] - delta_[y + r]) : 0.0f;
      }
    }
    if (a.mask.kind != MaskKind::kRefreshed) return;
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int key = slot + x + 16 * c, steps = key_steps(a.mask, key);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int at = (y + r) * kScoreStride + x + 16 * c;
        if (!sees_refreshed(a.mask, sights_[y + r], key, steps)) p_[at] = ds_[at] = 0.0f;
      }
    }
  }

  Sight* sights_;
  float *lse_, *delta_, *q_, *grad_, *k_, *v_, *p_, *ds_;
};

}  // namespace
}  // namespace rlir::cuda
