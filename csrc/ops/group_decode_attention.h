// temporary
#pragma once
#include "ops/video_attention.h"
namespace rlir {
inline constexpr const char* kGroupDecodeAttentionSchema =
    "group_decode_attention(Tensor q, Tensor prefix_k, Tensor prefix_v, Tensor suffix_k, Tensor "
    "suffix_v, Tensor prefix_lengths, Tensor suffix_lengths, Tensor? q_positions, str mask, int[] "
    "mask_numbers, int group_size, float scale) -> Tensor";
}
