// What the CUDA ops of attention share: their inputs for the kernels. Shapes are checked already.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "cuda/video_attention_backward.cuh"
#include "ops/cuda_call.h"
#include "ops/float_dtype.h"

namespace rlir {

class CudaAttention {
 public:
  CudaAttention(CudaCall& call, const char* op) : call_(call), op_(op) {}

  // [N][T][H][D]; a copy if the kernels cannot take it as it lies.
  cuda::Heads heads(const torch::stable::Tensor& x, const char* name) {
    torch::stable::Tensor y = x;
    if (!fits(x)) {
      y = torch::stable::clone(torch::stable::contiguous(x));
      kept_.push_back(y);
    }
    return {call_.in(y, name), y.stride(0), static_cast<int>(y.stride(1)),
            static_cast<int>(y.stride(2))};
  }

  cuda::KeyPart keys(const torch::stable::Tensor& k, const torch::stable::Tensor& v,
                     const std::optional<torch::stable::Tensor>& lengths) {
    cuda::KeyPart part{heads(k, "k"), heads(v, "v"), k.size(1), nullptr, 0};
    if (lengths) {
      part.lengths = static_cast<const int64_t*>(call_.in(*lengths, "lengths of keys"));
      part.length_stride = lengths->stride(0);
    }
    return part;
  }

  void queries(cuda::Attention& a, const torch::stable::Tensor& q,
               const std::optional<torch::stable::Tensor>& positions,
               const std::optional<torch::stable::Tensor>& lengths) {
    a.dtype = float_dtype(op_, q);
    a.q = heads(q, "q");
    a.sequences = q.size(0);
    a.tokens = q.size(1);
    a.heads = q.size(2);
    a.depth = q.size(3);
    RLIR_CHECK(a.depth == 32 || a.depth == 64 || a.depth == 128, op_,
               ": dim must be 32, 64 or 128 on CUDA, got ", a.depth);
    check_integers("q_lengths", lengths, q, a.sequences);
    if (positions) {
      const bool each = positions->dim() == 2;
      RLIR_CHECK(positions->scalar_type() == torch::headeronly::ScalarType::Long &&
                     (each || positions->dim() == 1) && positions->device() == q.device() &&
                     (!each || positions->size(0) == a.sequences) &&
                     positions->size(each ? 1 : 0) == a.tokens,
                 op_, ": q_positions must be int64 [", a.sequences, ", ", a.tokens, "] or [",
                 a.tokens, "] on q's device, got otherwise");
      a.positions = static_cast<const int64_t*>(call_.in(*positions, "q_positions"));
      a.position_batch = each ? positions->stride(0) : 0;
      a.position_token = positions->stride(each ? 1 : 0);
    }
    if (lengths) {
      a.q_lengths = static_cast<const int64_t*>(call_.in(*lengths, "q_lengths"));
      a.q_length_stride = lengths->stride(0);
    }
  }

  float* scratch(const torch::stable::Tensor& like, const char* name, int64_t count) {
    kept_.push_back(torch::stable::new_empty(like, {count}, torch::headeronly::ScalarType::Float));
    return static_cast<float*>(call_.out(kept_.back(), name));
  }

  // Keys and values of a part, of `sequences` batches, for queries q [N][T][H][D].
  void check_keys(const char* name, const torch::stable::Tensor& q, const torch::stable::Tensor& k,
                  const torch::stable::Tensor& v, int64_t sequences) const {
    for (const auto* x : {&k, &v}) {
      RLIR_CHECK(x->dim() == 4 && x->size(0) == sequences && x->size(1) == k.size(1) &&
                     x->size(2) == k.size(2) && x->size(3) == q.size(3),
                 op_, ": ", name, " k and v must be [", sequences, ", slots, kv_heads, ", q.size(3),
                 "], got otherwise");
      RLIR_CHECK(x->scalar_type() == q.scalar_type() && x->device() == q.device(), op_, ": ", name,
                 " k and v must have q's dtype and device, got otherwise");
    }
    RLIR_CHECK(k.size(2) >= 1 && q.size(2) >= 1 && q.size(2) % k.size(2) == 0, op_,
               ": q's heads must be a multiple of k's, got ", q.size(2), " and ", k.size(2));
  }

  void check_integers(const char* name, const std::optional<torch::stable::Tensor>& x,
                      const torch::stable::Tensor& q, int64_t n) const {
    if (!x) return;
    RLIR_CHECK(x->scalar_type() == torch::headeronly::ScalarType::Long && x->dim() == 1 &&
                   x->size(0) == n && x->device() == q.device(),
               op_, ": ", name, " must be int64 [", n, "] on q's device, got otherwise");
  }

  // Contiguous; a copy if it is not.
  const float* floats(const torch::stable::Tensor& x, const char* name) {
    kept_.push_back(torch::stable::contiguous(x));
    return static_cast<const float*>(call_.in(kept_.back(), name));
  }

  void* bytes(const torch::stable::Tensor& like, const char* name, int64_t count) {
    kept_.push_back(torch::stable::new_empty(like, {count}, torch::headeronly::ScalarType::Byte));
    return call_.out(kept_.back(), name);
  }

  // What the backward kernels read of the forward pass, and their scratch. `in` is complete.
  void gradient(cuda::AttentionBackward& g, const torch::stable::Tensor& grad_out,
                const torch::stable::Tensor& out, const torch::stable::Tensor& lse) {
    const cuda::Attention& a = g.in;
    for (const auto* x : {&grad_out, &out}) {
      RLIR_CHECK(x->dim() == 4 && x->size(0) == a.sequences && x->size(1) == a.tokens &&
                     x->size(2) == a.heads && x->size(3) == a.depth,
                 op_, ": gradients and out must have q's shape, got otherwise");
      RLIR_CHECK(float_dtype(op_, *x) == a.dtype && x->device() == out.device(), op_,
                 ": gradients and out must have q's dtype and device, got otherwise");
    }
    RLIR_CHECK(lse.scalar_type() == torch::headeronly::ScalarType::Float &&
                   lse.numel() == a.sequences * a.tokens * a.heads,
               op_, ": lse must be float32 [N, T, Hq], got otherwise");
    g.grad_out = heads(grad_out, "grad_out");
    g.out = heads(out, "out");
    g.lse = floats(lse, "lse");
    for (int p = 0; p < a.parts; ++p) {
      const int64_t batches = p == 0 ? a.sequences / a.group : a.sequences;
      const int64_t tiles = batches * cuda::gradient_tiles(a, p);
      g.rows[p] = {scratch(grad_out, "lse of rows", tiles * 64 * a.kv_heads),
                   scratch(grad_out, "delta of rows", tiles * 64 * a.kv_heads),
                   bytes(grad_out, "sights of rows", tiles * 64 * 16),
                   bytes(grad_out, "spans of rows", tiles * 16)};
    }
  }

  // Rows of queries that share a head of keys, and so the tiles, are counted in 32 bits.
  void check_counts(const cuda::Attention& a, int64_t members) const {
    const int64_t rows = members * a.tokens * (a.heads / a.kv_heads);
    const int64_t slots = a.part[0].slots + (a.parts > 1 ? a.part[1].slots : 0);
    RLIR_CHECK(rows < INT32_MAX / 2, op_, ": queries that share keys must be below 2^30, got ",
               rows);
    RLIR_CHECK(slots < INT32_MAX / 2, op_, ": keys must be below 2^30, got ", slots);
    RLIR_CHECK(rows * a.sequences / members * a.kv_heads < INT32_MAX, op_,
               ": queries times heads must be below 2^31, got ", a.sequences * a.tokens * a.heads);
  }

 private:
  // Strides of 16 bytes, for copies of that size.
  static bool fits(const torch::stable::Tensor& x) {
    if (x.numel() == 0) return true;
    const int64_t step = x.scalar_type() == torch::headeronly::ScalarType::BFloat16 ? 8 : 1;
    bool fits = x.stride(3) == 1 &&
                (step == 1 || reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0);
    for (int d = 0; d < 3; ++d) {
      if (x.size(d) == 1) continue;
      fits = fits && x.stride(d) % step == 0 && (d == 0 || x.stride(d) <= INT32_MAX);
    }
    return fits;
  }

  CudaCall& call_;
  const char* op_;
  std::vector<torch::stable::Tensor> kept_;
};

}  // namespace rlir
