"""The policy's loss, in plain PyTorch."""

from dataclasses import dataclass

import torch
from torch import Tensor


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
) -> tuple[Tensor, LossStatistics]:
    """Token-level clipped objective with a KL penalty (GRPO, arXiv 2402.03300, eq. 3 and 4).

    ``-min(r A, clip(r, 1 - low, 1 + high) A) + w (exp(q - p) - (q - p) - 1)``, mean over tokens,
    with ratio r = exp(p - p_old), log-probabilities p of the policy and q of the frozen base.
    All [B, T]; advantages broadcast. Gradients flow to ``logprob``.
    """
    ratio = (logprob - old_logprob).exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    gain = torch.minimum(ratio * advantages, clipped * advantages)
    log_ratio = ref_logprob - logprob
    kl = log_ratio.clamp(-20, 20).exp() - log_ratio - 1
    loss = (kl_weight * kl - gain).mean()
    with torch.no_grad():
        outside = (ratio < 1 - clip_low) | (ratio > 1 + clip_high)
        return loss, LossStatistics(
            float(kl.mean()), float(outside.float().mean()), float(ratio.mean())
        )
