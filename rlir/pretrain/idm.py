"""Train an inverse dynamics model on real and on tokenised clips.

Half of the clips of a batch went through the tokenizer: what the world model can draw is what
the model must be able to read.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rlir.actions.space import action_space
from rlir.data.clips import Clips, Progress, to_bytes, to_unit
from rlir.models.idm import InverseDynamics, InverseDynamicsConfig
from rlir.models.tokenizer import Tokenizer
from rlir.training import FitConfig


@dataclass(frozen=True)
class InverseDynamicsTraining:
    """An inverse dynamics model and how it is trained."""

    model: InverseDynamicsConfig = field(default_factory=InverseDynamicsConfig)
    fit: FitConfig = field(
        default_factory=lambda: FitConfig(steps=4000, batch=24, learning_rate=8e-4)
    )
    clip: int = 5
    """Frames of a clip."""
    tokenised: float = 0.5
    """Share of clips that went through the tokenizer."""
    label_smoothing: float = 0.02
    """Label smoothing of the cross-entropy."""
    validation_clips: int = 384
    """Held-out clips of an evaluation, seen real and tokenised."""


def reconstructions(
    clips: Clips, tokenizer: Tokenizer, name: str, progress: Progress
) -> np.ndarray:
    """Every frame as the tokenizer draws it, uint8 [N, H, W, 3], made once and cached."""

    def make(frames: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return to_bytes(tokenizer.decode(tokenizer.encode(to_unit(frames))))

    shape = clips.frames.shape[1:]
    with torch.no_grad():
        return clips.derived(f"reconstructed-{name}", shape, clips.frames.dtype, make, progress)


class InverseDynamicsTask:
    """Mean cross-entropy over factors, frames and clips."""

    def __init__(
        self,
        config: InverseDynamicsTraining,
        train: tuple[Clips, np.ndarray],
        validation: tuple[Clips, np.ndarray],
    ):
        torch.manual_seed(config.fit.seed)
        self.config = config
        self.model = InverseDynamics(config.model)
        self.space = action_space(config.model.space)
        self.clips, self.drawn = train
        self.starts = self.clips.starts(config.clip)
        held_out, drawn = validation
        picked = held_out.pick(config.validation_clips, config.clip, seed=0)
        self.held_out = [held_out.clip(x, picked, config.clip) for x in (held_out.frames, drawn)]
        self.truth = held_out.clip(held_out.actions, picked, config.clip)[:, :-1]

    def loss(self, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        config, length = self.config, self.config.clip
        n = config.fit.batch
        starts = self.starts[torch.randint(len(self.starts), (n,), generator=generator)]
        frames = self.clips.clip(self.clips.frames, starts, length)
        tokenised = torch.rand(n, generator=generator) < config.tokenised
        frames[tokenised] = self.clips.clip(self.drawn, starts[tokenised], length)
        actions = self.clips.clip(self.clips.actions, starts, length)[:, :-1].clone()
        mirrored = torch.rand(n, generator=generator) < 0.5
        frames[mirrored] = frames[mirrored].flip(-2)
        flipped = self.space.mirrored(actions[mirrored].numpy())
        actions[mirrored] = torch.from_numpy(flipped)
        gain = 1 + 0.1 * torch.randn(n, 1, 1, 1, 1, generator=generator)
        shift = 0.05 * torch.randn(n, 1, 1, 1, 1, generator=generator)
        with torch.autocast("cpu", torch.bfloat16):
            logits = self.model(to_unit(frames) * gain + shift)
        losses = [
            F.cross_entropy(
                x.float().flatten(0, 1),
                actions[..., i].flatten(),
                label_smoothing=config.label_smoothing,
            )
            for i, x in enumerate(logits)
        ]
        return torch.stack(losses).mean(), {}

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        figures = {}
        for name, frames in zip(("real", "tokenised"), self.held_out, strict=True):
            read, _ = self.model.read(to_unit(frames))
            hit = (read == self.truth).float()
            figures[f"{name}_accuracy"] = float(hit.mean())
            for i, factor in enumerate(self.space.factor_names):
                figures[f"{name}_{factor}"] = float(hit[..., i].mean())
        return figures
