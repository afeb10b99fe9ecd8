"""Do the rollout engine and the trainer mean the same policy? Their log-probabilities, compared.

Legend: B rollouts, L frames with the prompt, S visual tokens a frame, A action tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlir.actions.space import action_space
from rlir.errors import InputError
from rlir.models.shared_prompt import group_hidden
from rlir.models.world_model import WorldModel
from rlir.ops import selected_logprob
from rlir.rollout.engine import RolloutEngine
from rlir.rollout.sampling import Sampling
from rlir.rollout.schedule import Schedule, sequential
from rlir.rollout.stepwise import StepwiseEngine
from rlir.rollout.trajectories import Trajectories, prompts_of


def token_logprob(
    model: WorldModel,
    codes: Tensor,
    blocks: Tensor,
    temperature: float,
    dtype: torch.dtype = torch.bfloat16,
    *,
    schedule: Schedule | None = None,
    context: int = 1,
    support: Tensor | None = None,
) -> Tensor:
    """log p of the visual tokens of frames 1.., teacher-forced: float32 [B, L - 1, S].

    No logits in memory; gradients flow to the model. Operands of products are rounded to ``dtype``,
    as the engine of that dtype does.

    Args:
        codes: int64 [B, L, S]; blocks: action tokens int64 [B, L - 1, A], counted from 0.
        temperature: of the sampling; at 0 (greedy) the model is untempered.
        schedule: under which the frames from ``context`` on were drawn; raster order if None.
        context: the first frames, which were given. Their tokens are scored as well.
        support: uint8 [B, L - 1, S, ceil(V / 8)] that tokens were drawn from, as ``Trajectories``
            have it; that of frames that were given is not looked at.
    """
    if support is not None and context > 1:
        everything = torch.full_like(support[:, : context - 1], 255)
        support = torch.cat([everything, support[:, context - 1 :]], 1)
    with _precision(codes, dtype):
        hidden = model.hidden(codes, blocks, schedule=schedule, context=context)
    return _selected(model, hidden, codes[:, 1:], temperature, dtype, support)


def group_logprob(
    model: WorldModel,
    codes: Tensor,
    blocks: Tensor,
    sizes: Sequence[int],
    temperature: float,
    dtype: torch.dtype = torch.bfloat16,
    *,
    schedule: Schedule | None = None,
    context: int = 1,
    support: Tensor | None = None,
) -> Tensor:
    """log p of the visual tokens of frames C.. of groups of clips: float32 [B, L - C, S].

    Has the bits of ``token_logprob`` on the CPU, but what a group was given goes through the model
    once, and so does its gradient.

    Args:
        sizes: how many consecutive clips a group has; they share ``context`` frames (C) and action
            blocks (``rlir.models.shared_prompt.group_hidden``).
        support: uint8 [B, L - C, S, ceil(V / 8)].
    """
    with _precision(codes, dtype):
        hidden = group_hidden(model, codes, blocks, sizes, schedule=schedule, context=context)
    return _selected(model, hidden, codes[:, context:], temperature, dtype, support)


def trajectory_logprob(
    model: WorldModel, trajectories: Trajectories, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """log p of what was drawn, teacher-forced, on the support it was drawn from.

    float32 [B, L - 1, S] on the model's device, 0 where nothing was drawn (``Trajectories.drawn``).
    Gradients flow to the model. Of the policy that rolled out it has the bits of
    ``Trajectories.logprob`` on the CPU. Consecutive rows of a group share the work on their prompt.
    """
    device = model.lm_head.weight.device
    out = torch.zeros(trajectories.logprob.shape, device=device)
    kinds = torch.stack([trajectories.context, trajectories.frames], 1)
    for context, frames in kinds.unique(dim=0).tolist():
        if context == frames:
            continue
        rows = (kinds == torch.tensor([context, frames])).all(1).nonzero()[:, 0]
        support = trajectories.support
        if support is not None:
            support = support[rows, context - 1 : frames - 1].to(device)
        out[rows.to(device), context - 1 : frames - 1] = group_logprob(
            model,
            trajectories.codes[rows, :frames].to(device),
            trajectories.actions[rows, : frames - 1].to(device),
            trajectories.group[rows].unique_consecutive(return_counts=True)[1].tolist(),
            trajectories.sampling.temperature,
            dtype,
            schedule=trajectories.schedule,
            context=context,
            support=support,
        )
    return out


def _precision(codes: Tensor, dtype: torch.dtype) -> torch.autocast:
    return torch.autocast(codes.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)


def _selected(
    model: WorldModel,
    hidden: Tensor,
    drawn: Tensor,
    temperature: float,
    dtype: torch.dtype,
    support: Tensor | None,
) -> Tensor:
    """log p of drawn [B, L, S] from hidden [B, L, S, D] on support [B, L, S, ceil(V / 8)]."""
    logprob, _ = selected_logprob(
        hidden.flatten(0, 2).to(dtype),
        model.lm_head.weight.to(dtype),
        drawn.flatten(),
        temperature=temperature or 1.0,
        support=None if support is None else support.flatten(0, 2),
        compute_entropy=False,
    )
    return logprob.view(drawn.shape)


@dataclass(frozen=True)
class Parity:
    """How far the trainer's log-probabilities are from those that rollouts were drawn with."""

    tokens: int
    differ: int
    """Tokens whose two log-probabilities are not the same number."""
    largest: float
    """The largest difference, in nats."""
    ratio: float
    """Mean of exp(trainer - engine); 1 without mismatch."""
    kl: float
    """Mean of exp(d) - 1 - d, d = trainer - engine (k3): the KL to the rollout policy."""

    @property
    def exact(self) -> bool:
        return self.differ == 0


def compare(engine: Tensor, trainer: Tensor) -> Parity:
    """Log-probabilities of the same tokens."""
    d = (trainer.detach() - engine).double().flatten()
    return Parity(
        tokens=d.numel(),
        differ=int((d != 0).sum()),
        largest=float(d.abs().max()) if d.numel() else 0.0,
        ratio=float(d.exp().mean()) if d.numel() else 1.0,
        kl=float((d.expm1() - d).mean()) if d.numel() else 0.0,
    )


def measure(
    model: WorldModel,
    dtype: torch.dtype = torch.bfloat16,
    *,
    prompts: int = 2,
    group_size: int = 4,
    temperature: float = 1.0,
    schedule: Schedule | None = None,
    frames: int = 4,
    seed: int = 0,
) -> Parity:
    """Roll out from random prompts under random actions, then score with gradients enabled.

    On the model's device: by ``RolloutEngine`` on the CPU, else by ``StepwiseEngine``. At most
    ``frames`` frames a rollout.
    """
    if prompts < 1 or group_size < 1 or temperature <= 0 or frames < 1:
        raise InputError(
            "parity: prompts, group_size and frames must be >= 1 and temperature > 0, "
            f"got {prompts}, {group_size}, {frames}, {temperature}"
        )
    config, generator = model.config, torch.Generator().manual_seed(seed)
    first = torch.randint(config.codes, (prompts, config.tokens), generator=generator)
    shape = (prompts, min(config.frames - 1, frames))
    sizes = action_space(config.space).factor_sizes
    actions = torch.stack([torch.randint(n, shape, generator=generator) for n in sizes], -1)
    device = model.lm_head.weight.device
    engine = RolloutEngine if device.type == "cpu" else StepwiseEngine
    drawn = engine(model, dtype).rollout(
        prompts_of(first, actions),
        group_size=group_size,
        schedule=schedule or sequential(),
        sampling=Sampling(temperature),
        seed=seed,
    )
    with torch.enable_grad():
        scored = trajectory_logprob(model, drawn, dtype)
    return compare(drawn.logprob, scored.cpu())
