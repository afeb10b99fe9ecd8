"""The objective of torchrl's ``GRPOLoss`` (0.14.1) as a function of tensors.

torchrl's class draws log-probabilities from an actor's distribution (``_log_weight``) and then
computes what stands here: call ``grpo_loss`` with them, from a subclass's ``forward`` or a loop.
"""

from typing import Literal

from torch import Tensor

from rlir import ops
from rlir.errors import InputError


def grpo_loss(
    log_prob: Tensor,
    sample_log_prob: Tensor,
    advantage: Tensor,
    mask: Tensor | None = None,
    *,
    clip_epsilon: float | tuple[float, float] = 0.2,
    aggregation: Literal["token_mean", "prompt_mean"] = "token_mean",
    kl_to_ref_coeff: float | None = None,
    ref_log_prob: Tensor | None = None,
) -> dict[str, Tensor]:
    """torchrl's clipped objective and KL penalty, by ``rlir.ops.policy_loss``.

    ``log_prob``, ``sample_log_prob``, ``ref_log_prob`` [B, T]; ``advantage`` [B, T] or, as torchrl
    stores it, [B, T, 1]; ``mask`` bool [B, T]. Returns, under torchrl's names, ``loss_objective``
    (-min(w A, clip(w) A)), ``clip_fraction``, ``kl_approx``, ``ESS`` and, with a coefficient,
    ``loss_kl_to_ref`` and ``kl_to_ref`` (k3, over all B x T places, as there). Where torchrl's
    ``clip_fraction`` and ``kl_approx`` count places outside the mask as well, these do not.
    """
    if aggregation not in ("token_mean", "prompt_mean"):
        raise InputError(
            f"grpo_loss: aggregation must be 'token_mean' or 'prompt_mean', got {aggregation!r}"
        )
    low, high = clip_epsilon if isinstance(clip_epsilon, tuple) else (clip_epsilon, clip_epsilon)
    if advantage.dim() == 3:
        advantage = advantage.squeeze(-1)
    loss, seen = ops.policy_loss(
        log_prob,
        sample_log_prob,
        advantage,
        mask=mask,
        loss_type="bnpo" if aggregation == "token_mean" else "grpo",
        clip_low=low,
        clip_high=high,
    )
    out = {
        "loss_objective": loss,
        "clip_fraction": seen.outside,
        "kl_approx": seen.old_kl,
        "ESS": seen.ess,
    }
    if kl_to_ref_coeff is not None and kl_to_ref_coeff > 0:
        if ref_log_prob is None:
            raise InputError("grpo_loss: kl_to_ref_coeff must come with ref_log_prob, got none")
        out["loss_kl_to_ref"], _ = ops.policy_loss(
            log_prob,
            log_prob.detach(),
            log_prob.new_zeros(len(log_prob)),
            ref_logprob=ref_log_prob,
            mask=mask,
            loss_type="dr_grpo",  # divides by B T
            kl_weight=kl_to_ref_coeff,
        )
        out["kl_to_ref"] = out["loss_kl_to_ref"].detach() / kl_to_ref_coeff
    return out
