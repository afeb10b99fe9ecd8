"""What OpenRLHF (0.11.2) calls: ``log_probs_from_logits`` and ``PolicyLoss``.

openrlhf.trainer.ray.ppo_actor.PolicyLoss = rlir.integrations.openrlhf.PolicyLoss
"""

import math

import torch
from torch import Tensor, nn

from rlir import ops
from rlir.errors import InputError
from rlir.integrations import logprob as logprobs
from rlir.integrations.weights import weighted

_LARGEST = math.exp(20.0)  # OpenRLHF bounds PPO's log-ratio by 20
Results = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]


def log_probs_from_logits(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature)[labels]; logits [..., V], labels [...].

    Unlike OpenRLHF's it leaves the logits as they are.
    """
    return logprobs.from_logits(logits, labels, temperature)


class PolicyLoss(nn.Module):
    """OpenRLHF's ``PolicyLoss`` (PPO and GSPO, with its corrections), by the fused op."""

    def __init__(
        self,
        clip_eps_low: float = 0.2,
        clip_eps_high: float = 0.2,
        dual_clip: float | None = None,
        token_level_loss: bool = True,
        policy_loss_type: str = "ppo",
        is_correction_level: str = "off",
        is_correction_mode: str = "mask",
        is_correction_gating: str = "ratio",
        is_correction_threshold: tuple[float, float] = (0.5, 5.0),
    ) -> None:
        super().__init__()
        for name, value, known in (
            ("policy_loss_type", policy_loss_type, ("ppo", "gspo")),
            ("is_correction_level", is_correction_level, ("off", "token", "seq")),
            ("is_correction_mode", is_correction_mode, ("mask", "clip")),
            ("is_correction_gating", is_correction_gating, ("ratio", "binary_kl", "tv")),
        ):
            if value not in known:
                what = f"{name} must be one of {', '.join(known)}"
                raise InputError(f"PolicyLoss: {what}, got {value!r}")
        if dual_clip is not None and not dual_clip >= 1 + clip_eps_high:
            raise InputError(
                f"PolicyLoss: dual_clip must be >= 1 + {clip_eps_high}, got {dual_clip}"
            )
        by_ratio = is_correction_gating == "ratio"
        if is_correction_mode == "clip" and (is_correction_level == "seq" or not by_ratio):
            raise InputError(
                "PolicyLoss: is_correction_mode clip must come with level token and gating ratio, "
                f"got {is_correction_level} and {is_correction_gating}"
            )
        self.clip_eps_low, self.clip_eps_high = clip_eps_low, clip_eps_high
        self.dual_clip = dual_clip
        self.policy_loss_type = policy_loss_type
        self.token_level_loss = token_level_loss and policy_loss_type != "gspo"
        self.is_correction_level = is_correction_level
        self.is_correction_mode = is_correction_mode
        self.is_correction_gating = is_correction_gating
        self.is_correction_threshold = is_correction_threshold

    def forward(
        self,
        log_probs: Tensor,
        old_log_probs: Tensor,
        advantages: Tensor,
        action_mask: Tensor | None = None,
        rollout_log_probs: Tensor | None = None,
        dp_size: int = 1,
        batch_num_tokens: float | None = None,
        global_batch_size: float | None = None,
    ) -> Results:
        """Loss, share of clipped tokens, KL to the old policy, KL of rollout and old, filtered.

        All [B, T]. The last two are None without a correction. For "gspo" the share is over rows.
        """
        mask = torch.ones_like(log_probs, dtype=torch.bool)
        if action_mask is not None:
            mask = action_mask.bool()
        corrected = self.is_correction_level != "off"
        if corrected and rollout_log_probs is None:
            raise InputError("PolicyLoss: is_correction_level must come with rollout_log_probs")
        gspo = self.policy_loss_type == "gspo"
        old, mismatch, filtered = old_log_probs, None, None
        if corrected and rollout_log_probs is not None:
            if gspo:
                old = rollout_log_probs
            else:
                weight, filtered = self._correction(old_log_probs, rollout_log_probs, mask)
                advantages = weighted(advantages, weight)
                mismatch = _mean(rollout_log_probs - old_log_probs, mask)
        limits = [x for x in (self.dual_clip, None if gspo else _LARGEST) if x is not None]
        factor: float | Tensor = 1.0
        normalizer: float | None = None
        if self.token_level_loss:
            normalizer = None if batch_num_tokens is None else batch_num_tokens / dp_size
        elif global_batch_size is not None:
            factor = len(mask) / global_batch_size * dp_size
        else:  # rows without a token do not count
            factor = len(mask) / mask.any(1).sum().clamp(min=1)
        loss, seen = ops.policy_loss(
            log_probs,
            old,
            advantages,
            mask=mask,
            loss_type="dapo" if self.token_level_loss else "grpo",
            importance_level="sequence" if gspo else "token",
            clip_low=self.clip_eps_low,
            clip_high=self.clip_eps_high,
            delta=min(limits) if limits else None,
            normalizer=normalizer,
        )
        moved = _mean(old_log_probs - log_probs.detach(), mask) if gspo else seen.old_kl
        return loss * factor, seen.clipped_low + seen.clipped_high, moved, mismatch, filtered

    @torch.no_grad()
    def _correction(self, old: Tensor, rollout: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Weights of tokens for what trainer and engine disagree in, and the share filtered."""
        low, high = self.is_correction_threshold
        by_row = self.is_correction_level == "seq"
        log_ratio = (old - rollout).where(mask, 0)

        def unit(x: Tensor) -> Tensor:  # of a row where the gate is a row's
            return (x * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True) if by_row else x

        if self.is_correction_gating == "ratio":
            seen = unit(log_ratio).exp()
        else:
            p = rollout.exp().clamp(1e-6, 1 - 1e-6)
            q = old.exp().clamp(1e-6, 1 - 1e-6)
            if self.is_correction_gating == "binary_kl":
                seen = unit(p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log())
            else:
                seen = unit((p - q).abs())
        keep = (seen >= low) & (seen <= high)
        if self.is_correction_mode == "clip":
            weight = seen.clamp(low, high)
        else:
            weight = log_ratio.exp().where(keep, 0.0)
        share = (~keep).float().mean() if by_row else _mean((~keep).float(), mask)
        return weight, share


def _mean(x: Tensor, mask: Tensor) -> Tensor:
    return x.detach().where(mask, 0).sum() / mask.sum().clamp(min=1)
