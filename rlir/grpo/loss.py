"""The policy's loss over tokens of frames, by the fused op."""

from dataclasses import dataclass

import torch
from torch import Tensor

from rlir import ops


@dataclass(frozen=True)
class LossStatistics:
    """Means over tokens of one minibatch."""

    kl: float
    clip_fraction: float
    ratio: float


def policy_loss(
    logprob: Tensor,
    old_logprob: Tensor,
    advantages: Tensor,
    ref_logprob: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    kl_weight: float,
    rollout_logprob: Tensor | None = None,
    truncated_importance: float | None = None,
) -> tuple[Tensor, LossStatistics]:
    """Token-level clipped objective with a KL penalty (GRPO, arXiv 2402.03300, eq. 3 and 4).

    ``-min(r A, clip(r, 1 - low, 1 + high) A) + w (exp(q - p) - (q - p) - 1)``, mean over tokens,
    with ratio r = exp(p - p_old), log-probabilities p of the policy and q of the frozen base.
    All [B, ..., T]; advantages broadcast. Gradients flow to ``logprob``. With the log-probabilities
    of another policy that rolled out, u, a token's term is weighted by
    min(exp(p_old - u), truncated_importance).
    """

    def flat(x: Tensor) -> Tensor:
        return x.expand_as(logprob).flatten(0, -2)

    rows = [flat(x) for x in (logprob, old_logprob, advantages, ref_logprob)]
    loss, seen = ops.policy_loss(
        *rows[:3],
        ref_logprob=rows[3],
        loss_type="bnpo",
        clip_low=clip_low,
        clip_high=clip_high,
        kl_weight=kl_weight,
        rollout_logprob=None if rollout_logprob is None else flat(rollout_logprob),
        truncated_importance=truncated_importance,
    )
    assert seen.kl is not None
    kl, outside, ratio = torch.stack([seen.kl, seen.outside, seen.ratio]).tolist()
    return loss, LossStatistics(kl, outside, ratio)
