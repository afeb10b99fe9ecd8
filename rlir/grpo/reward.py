"""The inverse reward: what the inverse dynamics model reads off a rollout, against the command.

``R = (1 / T) sum_t sum_f w_f r(read_tf, commanded_tf) / sum_f w_f`` with r = 1 if the most likely
class is the commanded one, else 0 (RLIR, arXiv 2509.23958; a match per factor).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from rlir.actions.space import CameraAxis, action_space
from rlir.grpo.config import GrpoConfig
from rlir.models.idm import InverseDynamics
from rlir.models.tokenizer import Tokenizer
from rlir.tracing import span


@torch.no_grad()
def draw(tokenizer: Tokenizer, codes: Tensor, batch: int = 128) -> Tensor:
    """Frames float32 [B, L, 3, H, W] in [-1, 1] of codes [B, L, S]."""
    frames = []
    with span("tokenizer.decode", codes.shape[0] * codes.shape[1]):
        for part in codes.flatten(0, 1).split(batch):
            with torch.autocast("cpu", torch.bfloat16):
                frames.append(tokenizer.decode(part))
    return torch.cat(frames).unflatten(0, codes.shape[:2])


@dataclass(frozen=True)
class Reward:
    """``frame`` float32 [B, T]: reward of each frame; ``read`` int64 [B, T, F]: classes read."""

    frame: Tensor
    read: Tensor


class InverseReward:
    """Scores rollouts with a frozen inverse dynamics model."""

    def __init__(self, idm: InverseDynamics, config: GrpoConfig):
        self.idm = idm
        self.kind = config.reward
        weights = [
            config.camera_weight if isinstance(factor, CameraAxis) else 1.0
            for factor in action_space(idm.config.space).factors
        ]
        self.weights = torch.tensor(weights) / sum(weights)

    @torch.no_grad()
    def __call__(self, frames: Tensor, actions: Tensor, batch: int = 64) -> Reward:
        """frames [B, L, 3, H, W] with the prompt first; actions int64 [B, L - 1, F]."""
        rewards, read = [], []
        with span("reward", len(frames)):
            for part, commanded in zip(frames.split(batch), actions.split(batch), strict=True):
                with torch.autocast("cpu", torch.bfloat16):
                    logits = self.idm(part)
                classes = torch.stack([x.float().argmax(-1) for x in logits], -1)
                if self.kind == "match":
                    score = (classes == commanded).float()
                else:
                    chosen = [
                        x.float().softmax(-1).gather(-1, commanded[..., i : i + 1])
                        for i, x in enumerate(logits)
                    ]
                    score = torch.cat(chosen, -1)
                # An IDM that returns NaN must not pass for one that reads class 0.
                finite = torch.stack([x.float().isfinite().all(-1) for x in logits], -1).all(-1)
                score = (score * self.weights).sum(-1)
                rewards.append(torch.where(finite, score, torch.nan))
                read.append(classes)
        return Reward(torch.cat(rewards), torch.cat(read))
