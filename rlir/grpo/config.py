"""Settings of GRPO with inverse rewards."""

import math
from dataclasses import dataclass
from typing import Literal

from rlir.errors import InputError
from rlir.rollout.sampling import Sampling
from rlir.rollout.schedule import Schedule, diagonal, sequential
from rlir.training import check_seed


@dataclass(frozen=True)
class GrpoConfig:
    """Group-relative policy optimisation (arXiv 2402.03300) of a world model."""

    steps: int = 60
    """Optimisation steps; each rolls out anew."""
    prompts: int = 4
    """Prompts a step."""
    group_size: int = 16
    """Rollouts of each prompt, compared with one another; at least 2."""
    frames: int = 5
    """Frames of a clip: one prompt frame and the generated ones."""
    temperature: float = 1.0
    """Sampling temperature of the rollouts."""
    top_p: float = 1.0
    """Of the rollouts: only the most likely tokens that together have this probability. The update
    scores them on the support they were drawn from."""
    window: int = 0
    """Diagonal rollouts: a row of tokens begins once the one above has so many. 0 is raster
    order. The update scores tokens as they were drawn."""
    row_end: Literal["prompt", "refresh"] = "prompt"
    """Of diagonal rollouts: what stands for a row's last token (rlir.rollout.schedule)."""
    rollout_weights: Literal["dtype", "int8"] = "dtype"
    """Weights that roll out: the policy's, or int8 a channel, whose samples are corrected."""
    truncated_importance: float = 2.0
    """With int8 weights, the most that a token counts for having been drawn by another policy."""
    reward: Literal["match", "probability"] = "match"
    """A factor's reward: 1 if the IDM reads the commanded class, or that class's probability."""
    camera_weight: float = 1.0
    """Weight of a camera axis beside a key group in the reward."""
    credit: Literal["trajectory", "frame"] = "trajectory"
    """One advantage a rollout, as in the paper, or one a frame (denser, easier to hack)."""
    kept: int = 0
    """Rollouts a step is updated on: those with the largest advantages (squared, summed over
    frames), which hold most of the gradient. 0 keeps them all."""
    learning_rate: float = 1e-4
    """AdamW's learning rate after warm-up."""
    schedule: Literal["constant", "linear"] = "constant"
    """The learning rate after warm-up: constant, or falling linearly to 0 at the end."""
    warmup: int = 3
    """Steps of linear warm-up."""
    clip_low: float = 0.2
    """The importance ratio is clipped below at 1 - clip_low."""
    clip_high: float = 0.2
    """The importance ratio is clipped above at 1 + clip_high."""
    kl_weight: float = 0.05
    """Weight of the KL divergence to the frozen base (k3 estimate)."""
    minibatches: int = 2
    """Optimizer steps a rollout batch is split into."""
    microbatch: int = 16
    """Rollouts that go through the model together; bounds memory, changes nothing else."""
    supervised_weight: float = 0.0
    """Weight of the next-token loss on the prompts' real continuations, mixed in."""
    supervised_clips: int = 8
    """Real clips a minibatch for that loss."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    seed: int = 0
    """Seeds prompts, sampling and minibatches."""
    checkpoint_every: int = 10
    """Steps between saved states; --resume goes on from the last one."""

    def __post_init__(self) -> None:
        if self.group_size < 2:
            raise InputError(
                f"grpo: group_size must be at least 2 (an advantage compares a group's members), "
                f"got {self.group_size}"
            )
        for name in ("steps", "prompts", "minibatches", "microbatch", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise InputError(f"grpo: {name} must be at least 1, got {getattr(self, name)}")
        if self.frames < 2:
            raise InputError(f"grpo: frames must be at least 2, got {self.frames}")
        above = ("temperature", "learning_rate", "max_grad_norm", "clip_low", "clip_high")
        for name in (*above, "truncated_importance"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"grpo: {name} must be above 0, got {getattr(self, name)}")
        for name in ("camera_weight", "kl_weight", "supervised_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"grpo: {name} must be at least 0, got {getattr(self, name)}")
        if self.supervised_weight and self.supervised_clips < 1:
            raise InputError(
                f"grpo: supervised_clips must be at least 1, got {self.supervised_clips}"
            )
        if not 0 < self.top_p <= 1:
            raise InputError(f"grpo: top_p must be above 0 and at most 1, got {self.top_p}")
        if self.window < 0:
            raise InputError(f"grpo: window must be at least 0, got {self.window}")
        check_seed(self.seed)
        rollouts = self.prompts * self.group_size
        if not 0 <= self.kept <= rollouts:
            raise InputError(
                f"grpo: kept must be from 0 to prompts * group_size = {rollouts}, got {self.kept}"
            )
        if self.minibatches > (self.kept or rollouts):
            raise InputError(
                f"grpo: minibatches must be at most the {self.kept or rollouts} rollouts of an "
                f"update, got {self.minibatches}"
            )

    def rollout_schedule(self) -> Schedule:
        """In what order rollouts draw."""
        return diagonal(self.window, self.row_end) if self.window else sequential()

    def sampling(self) -> Sampling:
        """How rollouts draw."""
        return Sampling(self.temperature, top_p=self.top_p if self.top_p < 1 else None)

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        rate = self.learning_rate * min(1.0, (step + 1) / max(1, self.warmup))
        if self.schedule == "linear":
            rate *= min(1.0, (self.steps - step) / max(1, self.steps - self.warmup))
        return rate
