"""TRL's ``GRPOTrainer`` with the fused ops: ``FusedGRPOTrainer``, or the mixin ``FusedOps``.

    from rlir.integrations.trl import FusedGRPOTrainer as GRPOTrainer

What is fused: the loss with its statistics (``policy_loss``), the advantages
(``group_advantage``), and, on the CPU, the log-probabilities and entropies (``selected_logprob``),
without the logits. Whatever the ops do not cover goes through TRL's own code: ``unfused`` says what
and why. Written against TRL 1.16, whose private methods it overrides.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from trl import GRPOTrainer
from trl.trainer import utils as trl_utils

from rlir import ops
from rlir.integrations.weights import weighted

_DTYPES = {torch.float32, torch.bfloat16}
LOSS_TYPES = ("grpo", "dr_grpo", "bnpo", "dapo", "cispo")
_MODEL_INPUTS = (
    "pixel_values",
    "image_grid_thw",
    "num_images",
    "pixel_attention_mask",
    "spatial_shapes",
    "num_tiles",
    "image_sizes",
    "token_type_ids",
    "mm_token_type_ids",
    "image_position_ids",
)


class FusedOps:
    """Goes before ``GRPOTrainer`` (or a subclass of it) among the bases of a trainer."""

    _rewards: Tensor | None = None

    def unfused(self: Any) -> str | None:
        """Why the loss of this configuration is TRL's own; None if it is the fused one."""
        if self.loss_type not in LOSS_TYPES:
            return f"loss_type {self.loss_type!r}"
        if self.top_entropy_quantile < 1.0:
            return "top_entropy_quantile"
        if self.off_policy_mask_threshold is not None:
            return "off_policy_mask_threshold"
        if self._entropy_bonus_enabled:
            return "the entropy bonus"
        return None

    # -- advantages ----------------------------------------------------------------------------

    def _calculate_rewards(self: Any, *args: Any, **options: Any) -> Tensor:
        rewards: Tensor = super()._calculate_rewards(*args, **options)  # type: ignore[misc]
        self._rewards = rewards
        return rewards

    def _generate_and_score_completions(self: Any, inputs: Any) -> dict[str, Any]:
        output: dict[str, Any] = super()._generate_and_score_completions(inputs)  # type: ignore[misc]
        per_function, self._rewards = self._rewards, None
        if per_function is None or self.multi_objective_aggregation != "sum_then_normalize":
            return output
        rewards = (per_function * self.reward_weights.to(per_function.device)).nansum(dim=1)
        rewards = rewards.masked_fill(per_function.isnan().all(dim=1), torch.nan)
        training = self.model.training
        advantages = ops.group_advantage(
            rewards,
            group_size=self.num_generations if training else self.num_generations_eval,
            scale=self.scale_rewards,
        )
        count = len(output["advantages"])
        begin = self.accelerator.process_index * count
        output["advantages"] = advantages[begin : begin + count].to(output["advantages"])
        return output

    # -- log-probabilities ---------------------------------------------------------------------

    def _get_per_token_logps_and_entropies(self: Any, *args: Any, **options: Any) -> Any:
        with _selected_logprob():
            return super()._get_per_token_logps_and_entropies(*args, **options)  # type: ignore[misc]

    # -- the loss ------------------------------------------------------------------------------

    def _compute_loss(self: Any, model: Any, inputs: dict[str, Any]) -> Tensor:
        if self.unfused() is not None:
            loss: Tensor = super()._compute_loss(model, inputs)  # type: ignore[misc]
            return loss
        mask = inputs["completion_mask"]
        if "tool_mask" in inputs:
            mask = mask * inputs["tool_mask"]
        logprob, entropies, aux_loss = self._get_per_token_logps_and_entropies(
            model,
            torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
            torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
            inputs["completion_ids"].size(1),
            compute_entropy=True,
            compute_aux_loss=self.aux_loss_enabled,
            **{name: inputs.get(name) for name in _MODEL_INPUTS},
        )
        old = inputs.get("old_per_token_logps")
        advantages = inputs["advantages"]
        if self.use_vllm and self.vllm_importance_sampling_correction:
            weight = inputs["importance_sampling_ratio"]
            advantages = weighted(advantages.reshape(len(mask), -1), weight).expand_as(logprob)
        training = self.model.training
        steps = self.current_gradient_accumulation_steps if training else 1.0
        normalizer = None
        if self.loss_type in ("dapo", "cispo"):
            normalizer = inputs["num_items_in_batch"].clamp(min=1.0)
            normalizer = normalizer / self.accelerator.num_processes
            if training:
                normalizer = normalizer * steps / self.args.steps_per_generation
        loss, seen = ops.policy_loss(
            logprob,
            logprob.detach() if old is None else old,
            advantages,
            ref_logprob=inputs["ref_per_token_logps"] if self.beta != 0.0 else None,
            mask=mask.bool(),
            loss_type=self.loss_type,
            importance_level=self.importance_sampling_level,
            clip_low=self.epsilon_low,
            clip_high=self.epsilon_high,
            delta=self.args.delta,
            kl_weight=self.beta,
            kl_estimator="k3",
            kl_importance=self.args.use_bias_correction_kl,
            normalizer=normalizer,
            max_length=self.max_completion_length if self.loss_type == "dr_grpo" else None,
        )
        if normalizer is None:
            loss = loss / steps
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * aux_loss / steps
            gathered = self.accelerator.gather_for_metrics(aux_loss)
            self._metrics["train" if training else "eval"]["aux_loss"].append(
                gathered.mean().item()
            )
        self._log_statistics(seen, entropies.detach(), mask)
        return loss

    def _log_statistics(
        self: Any, seen: ops.PolicyLossStatistics, entropies: Tensor, mask: Tensor
    ) -> None:
        """TRL's metrics, by one reduction and one copy to the host instead of one each."""
        ratios = seen.tokens  # how many ratios there are: of tokens, or of rows
        if self.importance_sampling_level == "sequence":
            ratios = mask.any(1).sum().to(seen.tokens)
        sums = {"entropy": ((entropies * mask).sum(), seen.tokens)}
        if seen.kl is not None:
            sums["kl"] = (seen.kl * seen.tokens, seen.tokens)
        if self.loss_type == "cispo":
            sums["cispo_clip_ratio"] = (seen.clipped_high * ratios, ratios)
        else:
            sums["clip_ratio/low_mean"] = (seen.clipped_low * ratios, ratios)
            sums["clip_ratio/high_mean"] = (seen.clipped_high * ratios, ratios)
            both = seen.clipped_low + seen.clipped_high
            sums["clip_ratio/region_mean"] = (both * ratios, ratios)
        pairs = torch.stack([torch.stack(pair).float() for pair in sums.values()])
        totals = self.accelerator.reduce(pairs, reduction="sum")
        means = (totals[:, 0] / totals[:, 1].clamp(min=1.0)).tolist()
        metrics = self._metrics["train" if self.model.training else "eval"]
        for name, value in zip(sums, means, strict=True):
            metrics[name].append(value)


class FusedGRPOTrainer(FusedOps, GRPOTrainer):  # type: ignore[misc]
    """``trl.GRPOTrainer``, fused: the same arguments, the same losses to rounding.

    Its metrics are TRL's but for ``clip_ratio/low_min`` and ``clip_ratio/high_max``, which need a
    figure for each sequence.
    """

    _name = "GRPO"


class _Selected:
    """Stands where TRL's ``ChunkedLogProbFunction`` does; what the op lacks goes to TRL's."""

    def __init__(self, chunked: Any) -> None:
        self.chunked = chunked

    def apply(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None,
        logit_scale: float,
        outputs: tuple[str, ...],
    ) -> tuple[Tensor | None, ...]:
        covered = {"log_probs", "entropy"}.issuperset(outputs) and logit_scale > 0
        # Elsewhere the op is plain PyTorch as yet, which holds all logits; TRL's does not.
        covered &= hidden.is_cpu and {hidden.dtype, weight.dtype} <= _DTYPES
        if final_logit_softcapping is not None or not covered:
            found: tuple[Tensor | None, ...] = self.chunked.apply(
                hidden,
                weight,
                bias,
                targets,
                temperature,
                chunk_size,
                final_logit_softcapping,
                logit_scale,
                outputs,
            )
            return found
        logprob, entropy = ops.selected_logprob(
            hidden,
            weight,
            targets,
            bias=bias,
            temperature=temperature / logit_scale,
            compute_entropy="entropy" in outputs,
        )
        return logprob, entropy, None, None, None


@contextmanager
def _selected_logprob() -> Iterator[None]:
    """TRL's fused LM head computes with ``rlir.ops.selected_logprob`` here."""
    chunked = trl_utils._ChunkedLogProbFunction
    trl_utils._ChunkedLogProbFunction = _Selected(chunked)
    try:
        yield
    finally:
        trl_utils._ChunkedLogProbFunction = chunked
