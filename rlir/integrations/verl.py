"""Functions with the signatures that verl (0.9.1) calls.

    from verl.trainer.ppo.core_algos import register_policy_loss
    register_policy_loss("rlir")(rlir.integrations.verl.policy_loss)  # actor.policy_loss.loss_mode

``logprobs_from_logits`` and ``FusedLinearForPPO`` stand in for those of
``verl.utils.torch_functional`` and ``verl.utils.experimental.torch_functional``.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlir import ops
from rlir.errors import InputError
from rlir.integrations import logprob as logprobs
from rlir.integrations.weights import weighted

AGGREGATIONS = (
    "token-mean",
    "token-sum",
    "seq-mean-token-sum",
    "seq-mean-token-sum-norm",
    "seq-mean-token-mean",
)
_LARGEST = math.exp(20.0)  # verl bounds the log-ratio by 20: it matters only without a dual clip


def policy_loss(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """verl's "vanilla" policy loss (PPO with a dual clip), by ``rlir.ops.policy_loss``.

    All [B, T]. ``config`` holds ``clip_ratio``, ``clip_ratio_low`` and ``clip_ratio_high`` (None:
    ``clip_ratio``), ``clip_ratio_c`` (3.0), and ``global_batch_info`` with ``dp_size``,
    ``batch_num_tokens``, ``global_batch_size`` and ``loss_scale_factor``, as verl's ActorConfig.
    Where verl divides by a count of 0 this has loss 0.
    """
    if config is None:
        raise InputError("policy_loss: config must hold clip_ratio, got None")
    low = config.clip_ratio_low if config.clip_ratio_low is not None else config.clip_ratio
    high = config.clip_ratio_high if config.clip_ratio_high is not None else config.clip_ratio
    dual = config.get("clip_ratio_c", 3.0)
    if not dual >= 1 + high:
        raise InputError(f"policy_loss: clip_ratio_c must be >= 1 + {high}, got {dual}")
    mask = response_mask.bool()
    if rollout_is_weights is not None:
        advantages = weighted(advantages, rollout_is_weights)
    loss_type, normalizer, factor = _reduction(
        loss_agg_mode, mask, **(getattr(config, "global_batch_info", None) or {})
    )
    loss, seen = ops.policy_loss(
        log_prob,
        old_log_prob,
        advantages,
        mask=mask,
        loss_type=loss_type,
        clip_low=low,
        clip_high=high,
        delta=min(dual, _LARGEST),
        normalizer=normalizer,
    )
    values = torch.stack([seen.clipped_low + seen.clipped_high, seen.old_kl, seen.clipped_delta])
    names = ("actor/pg_clipfrac", "actor/ppo_kl", "actor/pg_clipfrac_lower")
    return loss * factor, dict(zip(names, values.tolist(), strict=True))


def _reduction(
    mode: str,
    mask: Tensor,
    dp_size: int = 1,
    batch_num_tokens: float | None = None,
    global_batch_size: float | None = None,
    loss_scale_factor: float | None = None,
    **_: Any,
) -> tuple[Any, float | Tensor | None, float | Tensor]:
    """verl's ``agg_loss`` as loss_type, normalizer and a factor."""
    if mode not in AGGREGATIONS:
        raise InputError(
            f"policy_loss: loss_agg_mode must be one of {', '.join(AGGREGATIONS)}, got {mode!r}"
        )
    needed = {"token-mean": batch_num_tokens, "token-sum": 1}.get(mode, global_batch_size)
    if needed is None and dp_size > 1:
        name = "batch_num_tokens" if mode == "token-mean" else "global_batch_size"
        raise InputError(f"policy_loss: dp_size > 1 must come with {name}, got None")
    if mode == "token-mean":
        if batch_num_tokens is None:
            return "bnpo", None, 1.0
        return "dapo", batch_num_tokens / dp_size, 1.0
    if mode == "token-sum":
        return "dapo", 1.0 / dp_size, 1.0
    # Rows without a token do not count.
    rows = mask.any(1).sum().clamp(min=1) if global_batch_size is None else global_batch_size
    if mode == "seq-mean-token-mean":
        return "grpo", None, len(mask) / rows * dp_size
    if mode == "seq-mean-token-sum-norm":
        length = mask.shape[-1] if loss_scale_factor is None else loss_scale_factor
        return "dapo", rows * (length / dp_size), 1.0
    return "dapo", rows / dp_size, 1.0


def compute_grpo_outcome_advantage(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Sequence[Any] | np.ndarray[Any, Any],
    epsilon: float = 1e-6,
    norm_adv_by_std_in_grpo: bool = True,
    config: Any = None,
) -> tuple[Tensor, Tensor]:
    """verl's GRPO advantages, by ``rlir.ops.group_advantage``: [B, T], twice.

    ``index`` [B] names each row's group. As in verl, the only member of a group keeps its reward.
    """
    scores = token_level_rewards.sum(dim=-1)
    _, first, count = np.unique(np.asarray(index), return_inverse=True, return_counts=True)
    ids = torch.from_numpy(first.reshape(-1)).to(scores.device)
    scale: Any = "group" if norm_adv_by_std_in_grpo else "none"
    advantages = ops.group_advantage(scores, ids, scale=scale, eps=epsilon)
    alone = torch.from_numpy(count == 1).to(scores.device)[ids]
    kept = scores / (1.0 + epsilon) if norm_adv_by_std_in_grpo else scores
    advantages = advantages.where(~alone, kept)[:, None] * response_mask
    return advantages, advantages


def logprobs_from_logits(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
    """log softmax(logits)[labels]; logits [..., V], labels [...].

    ``inplace_backward`` is accepted and changes nothing: the logits are left as they are.
    """
    return logprobs.from_logits(logits, labels)


class FusedLinearForPPO(torch.nn.Module):
    """Log-probabilities and entropies straight from hidden states, without logits [N, V]."""

    def __init__(self, chunk_size: int = 512, impl_backend: str = "torch") -> None:
        super().__init__()  # both arguments are verl's; the op chooses for itself

    def forward(
        self,
        hidden_states: Tensor,
        vocab_weights: Tensor,
        input_ids: Tensor,
        temperature: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """hidden_states [(B,) T, H], vocab_weights [V, H], input_ids [(B,) T].

        Returns log-probabilities (float32) and entropies (in the dtype of hidden_states).
        """
        logprob, entropy = ops.selected_logprob(
            hidden_states.reshape(-1, hidden_states.shape[-1]),
            vocab_weights,
            input_ids.reshape(-1).to(torch.int64),
            temperature=temperature,
        )
        assert entropy is not None
        shape = input_ids.shape
        return logprob.float().view(shape), entropy.to(hidden_states.dtype).view(shape)
