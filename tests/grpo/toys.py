"""Trainers of tiny world models: with stand-ins for tokenizer and reward, or with real ones."""

from collections.abc import Callable
from pathlib import Path

import torch
from testkit import IDMS, TOKENIZER, WORLD_MODEL, stirred
from torch import Tensor, nn

from rlir.checkpoints import load_state
from rlir.data.clips import Clips
from rlir.grpo.config import GrpoConfig
from rlir.grpo.reward import InverseReward, Reward
from rlir.grpo.trainer import GrpoTrainer
from rlir.models.idm import InverseDynamics
from rlir.models.tokenizer import Tokenizer
from rlir.models.world_model import WorldModel

SMALL = {"prompts": 2, "group_size": 4, "frames": 3, "microbatch": 4, "checkpoint_every": 1}


class Codes(nn.Module):
    """Stands in for a tokenizer: its frames are the codes themselves."""

    def decode(self, codes: Tensor) -> Tensor:
        return codes.float()


class Even:
    """Stands in for the inverse reward: the share of even codes of each generated frame."""

    def __call__(self, frames: Tensor, actions: Tensor) -> Reward:
        return Reward((frames[:, 1:] % 2 == 0).float().mean(-1), actions)


class Spoiled(Even):
    """That reward, with a NaN for one rollout in one step of 2 groups, which are scored in turn."""

    def __init__(self, step: int, rollout: int, group_size: int = 4):
        self.calls, self.call = 0, 2 * step + rollout // group_size
        self.row = rollout % group_size

    def __call__(self, frames: Tensor, actions: Tensor) -> Reward:
        reward = super().__call__(frames, actions)
        if self.calls == self.call:
            reward.frame[self.row, -1] = torch.nan
        self.calls += 1
        return reward


def model_of(seed: int = 0) -> WorldModel:
    torch.manual_seed(seed)
    return stirred(WorldModel(WORLD_MODEL), scale=0.1).requires_grad_(True)


def codes_of(clips: Clips) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(16, (len(clips.frames), 8), generator=generator)


def toy(clips: Clips, reward: Callable | None = None, **settings: object) -> GrpoTrainer:
    config = GrpoConfig(**{**SMALL, **settings})
    return GrpoTrainer(config, model_of(), Codes(), reward or Even(), clips, codes_of(clips))


def real(clips: Clips, **settings: object) -> GrpoTrainer:
    """A trainer with a real tokenizer and a real inverse dynamics model."""
    config = GrpoConfig(**{**SMALL, **settings})
    torch.manual_seed(5)
    tokenizer = Tokenizer(TOKENIZER).eval().requires_grad_(False)
    idm = InverseDynamics(IDMS["learned"]).eval().requires_grad_(False)
    reward = InverseReward(idm, config)
    return GrpoTrainer(config, model_of(), tokenizer, reward, clips, codes_of(clips))


def bits(trainer: GrpoTrainer) -> dict:
    return {
        "model": trainer.model.state_dict(),
        "optimizer": trainer.optimizer.state_dict(),
        "step": trainer.step,
        "curves": trainer.curves,
    }


def copied(trainer: GrpoTrainer, path: Path) -> dict:
    """The trainer's state as a file would hold it."""
    trainer.save(path)
    return {k: v for k, v in load_state(path).items() if k in bits(trainer)}


def rewards(trainer: GrpoTrainer) -> list[float]:
    return [row["reward"] for row in trainer.curves]
