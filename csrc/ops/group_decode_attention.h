// rlir::group_decode_attention: schema, and checks that CPU and CUDA share.
#pragma once

#include "ops/video_attention.h"

namespace rlir {

inline constexpr const char* kGroupDecodeAttentionSchema =
    "group_decode_attention(Tensor q, Tensor prefix_k, Tensor prefix_v, Tensor suffix_k, Tensor "
    "suffix_v, Tensor prefix_lengths, Tensor suffix_lengths, Tensor? q_positions, str mask, int[] "
    "mask_numbers, int group_size, float scale) -> Tensor";

// Keys and values [rows, slots, kv_heads, dim] beside q [rollouts, tokens, heads, dim].
inline void check_part(const char* op, const char* name, const torch::stable::Tensor& k,
                       const torch::stable::Tensor& v, int64_t rows, const AttentionShape& s) {
  for (const auto* x : {&k, &v}) {
    RLIR_CHECK(x->dim() == 4 && x->size(0) == rows && x->size(1) == k.size(1) &&
                   x->size(2) == s.kv_heads && x->size(3) == s.dim,
               op, ": ", name, " must be [", rows, ", slots, ", s.kv_heads, ", ", s.dim,
               "], k and v alike, got otherwise");
  }
}

}  // namespace rlir
