"""Ops: a public function, its plain PyTorch reference and native kernels under one name each."""

from rlir.ops.group_advantage import group_advantage, group_advantage_reference

__all__ = ["group_advantage", "group_advantage_reference"]
