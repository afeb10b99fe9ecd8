"""Do the rollout engine and the trainer mean the same policy? Their log-probabilities, compared.

Legend: B rollouts, L frames with the prompt, S visual tokens a frame, A action tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from rlir.actions.space import action_space
from rlir.errors import InputError
from rlir.models.world_model import WorldModel
from rlir.ops import selected_logprob
from rlir.rollout.engine import RolloutEngine
from rlir.rollout.sampling import Sampling
from rlir.rollout.trajectories import prompts_of


def token_logprob(
    model: WorldModel,
    codes: Tensor,
    blocks: Tensor,
    temperature: float,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """log p of the visual tokens of frames 1.., teacher-forced: float32 [B, L - 1, S].

    ``codes`` [B, L, S], ``blocks`` [B, L - 1, A]. No logits in memory; gradients flow to the model.
    Operands of products are rounded to ``dtype``, as the engine of that dtype does.
    """
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        hidden = model.hidden(codes, blocks)
    drawn = codes[:, 1:]
    logprob, _ = selected_logprob(
        hidden.flatten(0, 2).to(dtype),
        model.lm_head.weight.to(dtype),
        drawn.flatten(),
        temperature=temperature,
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
    seed: int = 0,
) -> Parity:
    """Roll out from random prompts under random actions, then score with gradients enabled."""
    if prompts < 1 or group_size < 1 or temperature <= 0:
        raise InputError(
            "parity: prompts and group_size must be >= 1 and temperature > 0, "
            f"got {prompts}, {group_size}, {temperature}"
        )
    config, generator = model.config, torch.Generator().manual_seed(seed)
    first = torch.randint(config.codes, (prompts, config.tokens), generator=generator)
    shape = (prompts, config.frames - 1)
    sizes = action_space(config.space).factor_sizes
    actions = torch.stack([torch.randint(n, shape, generator=generator) for n in sizes], -1)
    drawn = RolloutEngine(model, dtype).rollout(
        prompts_of(first, actions),
        group_size=group_size,
        sampling=Sampling(temperature),
        seed=seed,
    )
    with torch.enable_grad():
        scored = token_logprob(model, drawn.codes, drawn.actions, temperature, dtype)
    return compare(drawn.logprob, scored)
