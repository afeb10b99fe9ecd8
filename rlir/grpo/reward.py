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
from rlir.ops import decode_actions, inverse_reward
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
    """``frame`` float32 [B, T]: reward of each frame; ``read`` int64 [B, T, F]: classes read,
    -1 where a logit was not finite."""

    frame: Tensor
    read: Tensor


class InverseReward:
    """Scores rollouts with a frozen inverse dynamics model."""

    def __init__(self, idm: InverseDynamics, config: GrpoConfig):
        self.idm = idm
        self.kind = config.reward
        self.space = action_space(idm.config.space)
        weights = [
            config.camera_weight if isinstance(factor, CameraAxis) else 1.0
            for factor in self.space.factors
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
                # One class vector a factor, camera axes first; each frame a trajectory of its own.
                axes = len(self.space.axes)
                camera = torch.cat(logits[:axes], -1).flatten(0, 1)[:, None] if axes else None
                groups = len(self.space.groups)
                keys = torch.cat(logits[axes:], -1).flatten(0, 1)[:, None] if groups else None
                score, matches = inverse_reward(
                    keys,
                    camera,
                    commanded.reshape(-1, 1, commanded.shape[-1]),
                    self.space,
                    weights=self.weights.tolist(),
                )
                if self.kind == "probability":
                    chosen = [
                        x.float().softmax(-1).gather(-1, commanded[..., i : i + 1])
                        for i, x in enumerate(logits)
                    ]
                    likely = (torch.cat(chosen, -1) * self.weights).sum(-1).flatten()
                    # An IDM that returns NaN or infinity has matches that are NaN.
                    score = torch.where(matches.isnan().any(-1)[:, 0], torch.nan, likely)
                rewards.append(score.view(commanded.shape[:2]))
                classes = decode_actions(keys, camera, self.space).classes
                read.append(classes.view(commanded.shape))
        return Reward(torch.cat(rewards), torch.cat(read))
