"""The control that decides: continued pretraining of the same base on the same clips.

A gain of post-training counts only beyond what the same time spent on more of the ordinary
training would have given.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlir import console
from rlir.data.clips import Clips
from rlir.errors import InputError
from rlir.models.world_model import WorldModel
from rlir.training import check_seed, make_muon, make_optimizer, step_generator


@dataclass(frozen=True)
class ControlConfig:
    """Continued pretraining."""

    steps: int = 200
    """Optimizer steps: those that fit in the post-training's wall time."""
    batch: int = 16
    """Clips a step."""
    learning_rates: tuple[float, ...] = (3e-5, 1e-4, 3e-4)
    """Peaks; each is tried, the best by the judge's macro F1 is the control."""
    warmup: int = 10
    """Steps of linear warm-up; from there the rate falls linearly to 0."""
    optimizer: Literal["adamw", "muon"] = "muon"
    """What pretraining used."""
    weight_decay: float = 0.05
    """AdamW weight decay, on matrices only."""
    seed: int = 0
    """Seeds the order of the data."""

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1:
            raise InputError(
                f"control: steps and batch must be at least 1, got {self.steps} and {self.batch}"
            )
        if not self.learning_rates or not all(0 < r < math.inf for r in self.learning_rates):
            raise InputError(
                f"control: learning_rates must be one or more above 0, got {self.learning_rates}"
            )
        check_seed(self.seed)


def continue_pretraining(
    base: WorldModel,
    clips: Clips,
    codes: Tensor,
    frames: int,
    config: ControlConfig,
    learning_rate: float,
    on_step: Callable[[int, WorldModel], None] | None = None,
) -> WorldModel:
    """A copy of the base, trained on for ``config.steps`` steps."""
    model = copy.deepcopy(base).requires_grad_(True).train()
    make = make_muon if config.optimizer == "muon" else make_optimizer
    optimizer = make(model, learning_rate, config.weight_decay, 0.95)
    starts = clips.starts(frames)
    with console.progress(f"control {learning_rate:g}", config.steps) as bar:
        for step in range(config.steps):
            generator = step_generator(config.seed, step)
            rows = starts[torch.randint(len(starts), (config.batch,), generator=generator)]
            batch = clips.clip(codes, rows, frames)
            actions = clips.clip(clips.actions, rows, frames)[:, :-1]
            for group in optimizer.param_groups:
                warm = min(1.0, (step + 1) / max(1, config.warmup))
                group["lr"] = learning_rate * warm * (1 - step / config.steps)
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(batch, model.action_ids(actions))
            loss = F.cross_entropy(logits.flatten(0, 2), batch[:, 1:].flatten())
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            bar(step + 1, f"loss {float(loss.detach()):.3f}")
            if on_step:
                on_step(step + 1, model)
    return model.eval().requires_grad_(False)
