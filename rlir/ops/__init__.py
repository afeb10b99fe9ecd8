"""Ops: a public function, its plain PyTorch reference and native kernels under one name each."""

from rlir.ops._action_heads import Actions
from rlir.ops._attention_backends import attention_backend
from rlir.ops._masks import Mask, causal, diagonal, frame_causal, visible
from rlir.ops._support import pack_support, unpack_support
from rlir.ops.decode_actions import decode_actions, decode_actions_reference
from rlir.ops.embedding import embedding, embedding_reference
from rlir.ops.flow_sde_step import FlowStep, flow_sde_step, flow_sde_step_reference
from rlir.ops.group_advantage import group_advantage, group_advantage_reference
from rlir.ops.group_attention import group_attention, group_attention_reference
from rlir.ops.group_decode_attention import (
    group_decode_attention,
    group_decode_attention_reference,
)
from rlir.ops.inverse_reward import inverse_reward, inverse_reward_reference
from rlir.ops.linear import linear, linear_reference
from rlir.ops.policy_loss import PolicyLossStatistics, policy_loss, policy_loss_reference
from rlir.ops.rms_norm import rms_norm, rms_norm_reference
from rlir.ops.rotary import rotary, rotary_reference
from rlir.ops.rotary_append import rotary_append_, rotary_append_reference
from rlir.ops.sample_tokens import sample_tokens, sample_tokens_reference
from rlir.ops.selected_logprob import (
    head_logits,
    head_logits_reference,
    outside_support,
    selected_logprob,
    selected_logprob_reference,
)
from rlir.ops.swiglu import swiglu, swiglu_reference
from rlir.ops.video_attention import video_attention, video_attention_reference

__all__ = [
    "Actions",
    "FlowStep",
    "Mask",
    "PolicyLossStatistics",
    "attention_backend",
    "causal",
    "decode_actions",
    "decode_actions_reference",
    "diagonal",
    "embedding",
    "embedding_reference",
    "flow_sde_step",
    "flow_sde_step_reference",
    "frame_causal",
    "group_advantage",
    "group_advantage_reference",
    "group_attention",
    "group_attention_reference",
    "group_decode_attention",
    "group_decode_attention_reference",
    "head_logits",
    "head_logits_reference",
    "inverse_reward",
    "inverse_reward_reference",
    "linear",
    "linear_reference",
    "outside_support",
    "pack_support",
    "policy_loss",
    "policy_loss_reference",
    "rms_norm",
    "rms_norm_reference",
    "rotary",
    "rotary_append_",
    "rotary_append_reference",
    "rotary_reference",
    "sample_tokens",
    "sample_tokens_reference",
    "selected_logprob",
    "selected_logprob_reference",
    "swiglu",
    "swiglu_reference",
    "unpack_support",
    "video_attention",
    "video_attention_reference",
    "visible",
]
