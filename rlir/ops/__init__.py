"""Ops: a public function, its plain PyTorch reference and native kernels under one name each."""

from rlir.ops._support import pack_support, unpack_support
from rlir.ops.group_advantage import group_advantage, group_advantage_reference
from rlir.ops.sample_tokens import sample_tokens, sample_tokens_reference
from rlir.ops.selected_logprob import (
    head_logits,
    head_logits_reference,
    outside_support,
    selected_logprob,
    selected_logprob_reference,
)

__all__ = [
    "group_advantage",
    "group_advantage_reference",
    "head_logits",
    "head_logits_reference",
    "outside_support",
    "pack_support",
    "sample_tokens",
    "sample_tokens_reference",
    "selected_logprob",
    "selected_logprob_reference",
    "unpack_support",
]
