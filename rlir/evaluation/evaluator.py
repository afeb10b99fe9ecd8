"""Roll out held-out clips and have both inverse dynamics models read them."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from rlir.actions.space import action_space
from rlir.data.clips import Clips, to_bytes, to_unit
from rlir.errors import InputError
from rlir.evaluation.summary import Reading, Scored
from rlir.grpo.reward import draw
from rlir.models.load import Models
from rlir.models.world_model import WorldModel
from rlir.rollout.engine import RolloutEngine, rollout_seed
from rlir.rollout.sampling import Sampling
from rlir.rollout.trajectories import prompts_of
from rlir.tracing import span
from rlir.training import check_seed

EVALUATION = 2**31
"""Draws of evaluations are numbered from here on, those of training steps below."""
PART = 64
"""Clips that are drawn and read together."""

Readings = dict[str, tuple[np.ndarray, np.ndarray]]
"""By inverse dynamics model: classes and features."""


@dataclass(frozen=True)
class EvaluationConfig:
    """How models are evaluated. Prompts and seeds are the same before and after."""

    clips: int = 384
    """Held-out clips of maps that training saw."""
    unseen_clips: int = 128
    """Held-out clips of maps that training never saw, reported beside; 0 leaves them out."""
    samples: int = 1
    """Continuations of every clip, each from a seed of its own: most of what moves a figure from
    one evaluation to the next is the draw."""
    frames: int = 5
    """Frames of a clip: one prompt frame and the generated ones."""
    temperature: float = 1.0
    """Sampling temperature."""
    during_clips: int = 64
    """Clips of the small evaluations while training runs."""
    during_every: int = 20
    """Steps between those; 0 leaves them out."""
    draws: int = 2000
    """Bootstrap draws of the intervals."""
    seed: int = 1234
    """Seeds the choice of clips and the sampling."""

    def __post_init__(self) -> None:
        limits = {"clips": 1, "unseen_clips": 0, "samples": 1, "frames": 2, "draws": 1}
        for name, least in limits.items():
            if getattr(self, name) < least:
                raise InputError(
                    f"evaluation: {name} must be at least {least}, got {getattr(self, name)}"
                )
        if self.during_clips < 1 or self.during_every < 0:
            raise InputError(
                f"evaluation: during_clips must be at least 1 and during_every at least 0, "
                f"got {self.during_clips} and {self.during_every}"
            )
        if not 0 <= self.temperature < math.inf:
            raise InputError(f"evaluation: temperature must be at least 0, got {self.temperature}")
        check_seed(self.seed)


class Evaluator:
    """Held-out clips with everything that does not depend on the world model, computed once."""

    def __init__(self, models: Models, clips: Clips, count: int, config: EvaluationConfig):
        self.models, self.config = models, config
        self.space = action_space(models.world_model.config.space)
        length = config.frames
        starts = clips.pick(count, length, config.seed)
        frames = clips.clip(clips.frames, starts, length)
        self.actions = clips.clip(clips.actions, starts, length)[:, :-1]
        self.maps = tuple(clips.map_of(int(start)) for start in starts)
        self.real = frames.numpy()
        self.codes = self._encode(frames)
        self.read_real, _ = self._read(to_unit(part) for part in frames.split(PART))

    @torch.no_grad()
    def _encode(self, frames: Tensor) -> Tensor:
        parts = []
        for part in frames.flatten(0, 1).split(128):
            with torch.autocast("cpu", torch.bfloat16):
                parts.append(self.models.tokenizer.encode(to_unit(part)))
        return torch.cat(parts).unflatten(0, frames.shape[:2])

    def _read(self, parts: Iterable[Tensor]) -> tuple[Readings, np.ndarray]:
        """Classes and features that the reward's model and the judge read off frames, which come
        in parts since in float32 they are large, and the frames in bytes.
        """
        found: dict[str, list[tuple[Tensor, Tensor]]] = {"reward": [], "judge": []}
        shown = []
        for frames in parts:
            found["reward"].append(self.models.reward_idm.read(frames))
            found["judge"].append(self.models.judge_idm.read(frames))
            shown.append(to_bytes(frames))
        readings = {}
        for name, read in found.items():
            classes, features = (torch.cat(x).numpy() for x in zip(*read, strict=True))
            readings[name] = (classes, features)
        return readings, torch.cat(shown).numpy()

    def continuations(
        self, model: WorldModel, count: int | None = None, batch: int = PART, seed: int = 0
    ) -> Tensor:
        """Codes [N, L, S] of the model's continuations of the first ``count`` clips.

        A clip's continuation depends on the clip and the seeds alone: its row id is its index.
        """
        engine, parts = RolloutEngine(model), []
        count = count or len(self.codes)
        for i in range(0, count, batch):
            rows = torch.arange(i, min(i + batch, count))
            drawn = engine.rollout(
                prompts_of(self.codes[rows, 0], self.actions[rows]),
                sampling=Sampling(self.config.temperature),
                seed=rollout_seed(self.config.seed, EVALUATION + seed),
                row_ids=rows,
            )
            parts.append(drawn.codes)
        return torch.cat(parts)

    def score_codes(self, codes: Tensor) -> Scored:
        """What both models read off drawn codes [n, L, S] of the first n clips."""
        return self._scored(*self._read(draw(self.models.tokenizer, x) for x in codes.split(PART)))

    def score(self, model: WorldModel, count: int | None = None, seed: int = 0) -> Scored:
        """What both models read off the world model's continuations."""
        with span("evaluate", count or len(self.codes)):
            return self.score_codes(self.continuations(model, count, seed=seed))

    def score_samples(self, model: WorldModel) -> list[Scored]:
        """``config.samples`` continuations of every clip, scored."""
        return [self.score(model, seed=seed) for seed in range(self.config.samples)]

    def _scored(self, read: Readings, shown: np.ndarray) -> Scored:
        n = len(shown)
        readings = {
            name: Reading(classes, features, self.read_real[name][1][:n])
            for name, (classes, features) in read.items()
        }
        return Scored(
            self.space,
            self.actions[:n].numpy(),
            readings["reward"],
            readings["judge"],
            shown,
            self.real[:n],
            self.maps[:n],
        )

    def ceiling(self) -> Scored:
        """The real frames: what the IDMs can read at best."""
        return self._scored(self.read_real, self.real)

    def tokenised(self) -> Scored:
        """The real frames as the tokenizer draws them: the ceiling of any world model on it."""
        return self.score_codes(self.codes)

    @staticmethod
    def floor(scored: Scored) -> Scored:
        """The same continuations against the commands of other clips: no obedience at all."""
        out = replace(scored, commanded=np.roll(scored.commanded, 1, axis=0))
        out.__dict__["quality"] = scored.quality  # the pictures are the same
        return out
