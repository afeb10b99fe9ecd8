"""Ops: a public function, its plain PyTorch reference and native kernels under one name each."""

from rlir.ops.group_advantage import group_advantage, group_advantage_reference
from rlir.ops.policy_loss import PolicyLossStatistics, policy_loss, policy_loss_reference

__all__ = [
    "PolicyLossStatistics",
    "group_advantage",
    "group_advantage_reference",
    "policy_loss",
    "policy_loss_reference",
]
