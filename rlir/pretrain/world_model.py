"""Train the world model on tokenised clips: next-token prediction of frames 1.. ."""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from rlir.data.clips import Clips, Progress, to_unit
from rlir.models.tokenizer import Tokenizer
from rlir.models.world_model import WorldModel, WorldModelConfig
from rlir.training import FitConfig


@dataclass(frozen=True)
class WorldModelTraining:
    """A world model and how it is trained."""

    model: WorldModelConfig = field(default_factory=WorldModelConfig)
    fit: FitConfig = field(
        default_factory=lambda: FitConfig(
            steps=8000, batch=16, learning_rate=1.5e-3, weight_decay=0.05
        )
    )
    validation_clips: int = 192
    """Held-out clips of an evaluation."""


def visual_codes(clips: Clips, tokenizer: Tokenizer, name: str, progress: Progress) -> Tensor:
    """Codes of every frame, int64 [N, S], made once and cached."""

    def make(frames: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return tokenizer.encode(to_unit(frames)).to(torch.int32)

    tail = (tokenizer.config.tokens,)
    with torch.no_grad():
        codes = clips.derived(f"codes-{name}", tail, "int32", make, progress)
    return torch.from_numpy(codes[:].astype("int64"))


class WorldModelTask:
    """Mean cross-entropy of the visual tokens."""

    def __init__(
        self,
        config: WorldModelTraining,
        train: tuple[Clips, Tensor],
        validation: tuple[Clips, Tensor],
        latents: Tensor | None = None,
    ):
        torch.manual_seed(config.fit.seed)
        self.config = config
        self.model = WorldModel(config.model)
        if latents is not None:
            self.model.relate_codes(latents)
        self.clips, self.codes = train
        length = config.model.frames
        self.starts = self.clips.starts(length)
        held_out, codes = validation
        picked = held_out.pick(config.validation_clips, length, seed=0)
        self.held_out = held_out.clip(codes, picked, length)
        actions = held_out.clip(held_out.actions, picked, length)[:, :-1]
        self.held_out_actions = self.model.action_ids(actions)

    def clip_loss(self, codes: Tensor, actions: Tensor) -> Tensor:
        """Mean cross-entropy in nats a token of codes [B, L, S], action blocks [B, L - 1, A]."""
        with torch.autocast("cpu", torch.bfloat16):
            logits = self.model(codes, actions)
        return F.cross_entropy(logits.flatten(0, 2), codes[:, 1:].flatten())

    def loss(self, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        n, length = self.config.fit.batch, self.config.model.frames
        starts = self.starts[torch.randint(len(self.starts), (n,), generator=generator)]
        codes = self.clips.clip(self.codes, starts, length)
        actions = self.clips.clip(self.clips.actions, starts, length)[:, :-1]
        return self.clip_loss(codes, self.model.action_ids(actions)), {}

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Held-out loss, and how much worse it is when clips swap their actions."""
        shuffled = self.held_out_actions.roll(1, 0)
        true, wrong = [], []
        for i in range(0, len(self.held_out), 32):
            codes, part = self.held_out[i : i + 32], slice(i, i + 32)
            true.append(self.clip_loss(codes, self.held_out_actions[part]))
            wrong.append(self.clip_loss(codes, shuffled[part]))
        loss = float(torch.stack(true).mean())
        return {"validation_loss": loss, "action_gap": float(torch.stack(wrong).mean()) - loss}
