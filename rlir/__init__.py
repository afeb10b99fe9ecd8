"""Reinforcement learning with inverse rewards for action-conditioned video world models."""

__version__ = "0.1.0"
