// rlir::group_attention and its backward: schemas.
#pragma once

#include "ops/group_decode_attention.h"

namespace rlir {

inline constexpr const char* kGroupAttentionSchema =
    "group_attention(Tensor q_prefix, Tensor k_prefix, Tensor v_prefix, Tensor q_suffix, Tensor "
    "k_suffix, Tensor v_suffix, int group_size, str mask, int[] mask_numbers, float scale) -> "
    "(Tensor, Tensor, Tensor, Tensor)";
inline constexpr const char* kGroupAttentionBackwardSchema =
    "group_attention_backward(Tensor? grad_out_prefix, Tensor? grad_out_suffix, Tensor q_prefix, "
    "Tensor k_prefix, Tensor v_prefix, Tensor q_suffix, Tensor k_suffix, Tensor v_suffix, Tensor "
    "out_prefix, Tensor lse_prefix, Tensor out_suffix, Tensor lse_suffix, int group_size, str "
    "mask, "
    "int[] mask_numbers, float scale) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)";

}  // namespace rlir
