"""What goes into a rollout and what comes out of it.

Legend: B rollouts, L frames of the longest one with its context, S visual tokens, A action tokens,
S' slots of an image (``rlir.rollout.schedule``), V codes, F action factors.
"""

import dataclasses
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from rlir.checkpoints import write_bytes
from rlir.errors import InputError
from rlir.rollout.sampling import Sampling
from rlir.rollout.schedule import Schedule

NOTHING = -1
"""In place of a code, a token or a step where there is none."""


@dataclass(frozen=True)
class Prompt:
    """What a group of rollouts continues."""

    codes: Tensor
    """Context frames, int64 [C, S], C >= 1."""
    actions: Tensor
    """Classes int64 [N, F]: action i leads from frame i to frame i + 1. The first C - 1 belong to
    the context, the others to the N + 1 - C frames to come."""

    def __post_init__(self) -> None:
        for name, x in (("codes", self.codes), ("actions", self.actions)):
            if x.dim() != 2 or x.dtype != torch.int64 or x.device.type != "cpu":
                raise InputError(
                    f"rollout: a prompt's {name} must be int64 of 2 dimensions on the CPU, "
                    f"got {x.dtype} of shape {tuple(x.shape)} on {x.device}"
                )
        if not 1 <= len(self.codes) <= len(self.actions) + 1:
            raise InputError(
                "rollout: a prompt must have at least 1 frame and an action for each frame after "
                f"the first, got {len(self.codes)} frames and {len(self.actions)} actions"
            )

    @property
    def context(self) -> int:
        """Frames that are given."""
        return len(self.codes)


def prompts_of(codes: Tensor, actions: Tensor) -> list[Prompt]:
    """One prompt a row: codes int64 [P, S] or [P, C, S], actions int64 [P, N, F]."""
    if len(codes) != len(actions):
        raise InputError(
            "rollout: prompts must each have an action sequence, "
            f"got {len(codes)} and {len(actions)}"
        )
    if codes.dim() == 2:
        codes = codes[:, None]
    return [Prompt(frames, given) for frames, given in zip(codes, actions, strict=True)]


@dataclass(frozen=True)
class Trajectories:
    """Rollouts, the members of a group in consecutive rows, groups in the order of their prompts.

    Rows are padded to the longest one with ``NOTHING`` (codes, actions, fed, step) and zeros.
    """

    codes: Tensor
    """int64 [B, L, S], the context first."""
    actions: Tensor
    """Action tokens int64 [B, L - 1, A], counted from 0."""
    context: Tensor
    """int64 [B]: frames that were given."""
    frames: Tensor
    """int64 [B]: frames in all."""
    logprob: Tensor
    """float32 [B, L - 1, S] of each drawn token, on the support it was drawn from."""
    entropy: Tensor
    """float32 [B, L - 1, S], of that distribution, in nats."""
    step: Tensor
    """int32 [B, L - 1, S]: the rollout's step, from 0, at which a token was drawn."""
    fed: Tensor
    """int64 [B, S' + (L - 1)(A + S')]: the token that was fed at every slot, action tokens counted
    from the number of codes. The last slot of a rollout is never fed."""
    group: Tensor
    """int64 [B]: the prompt that a rollout continues."""
    row_ids: Tensor
    """int64 [B]: what a rollout's random numbers are keyed by, with the seed."""
    support: Tensor | None
    """uint8 [B, L - 1, S, ceil(V / 8)] if the sampling truncates: token v is bit v % 8 of byte
    v // 8."""
    seed: int
    schedule: Schedule
    sampling: Sampling
    same_policy: bool = True
    """Whether the log-probabilities are those of the policy as it is trained; not if its weights
    were quantised for the rollout: correct them (truncated importance sampling)."""
    timings: dict[str, float] = field(default_factory=dict)
    """Seconds by phase, and counts."""

    @property
    def drawn(self) -> Tensor:
        """bool [B, L - 1]: frames 1.. that were drawn, not given or beyond the end."""
        frame = torch.arange(1, self.codes.shape[1])
        return (frame >= self.context[:, None]) & (frame < self.frames[:, None])

    def __len__(self) -> int:
        return len(self.codes)

    def rows(self, index: Tensor) -> "Trajectories":
        """Some of the rollouts."""
        return self._with({name: x[index] for name, x in self._tensors().items()})

    def outside_inference_mode(self) -> "Trajectories":
        """Copies that autograd takes, as it takes no tensor that was made in inference mode."""
        with torch.inference_mode(False):
            return self._with({name: x.clone() for name, x in self._tensors().items()})

    def _with(self, tensors: dict[str, Any]) -> "Trajectories":
        return dataclasses.replace(self, **tensors)

    def _tensors(self) -> dict[str, Tensor]:
        found = {x.name: getattr(self, x.name) for x in dataclasses.fields(self)}
        return {name: x for name, x in found.items() if isinstance(x, Tensor)}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file, whole or not at all."""
        about = {
            "seed": self.seed,
            "schedule": dataclasses.asdict(self.schedule),
            "sampling": dataclasses.asdict(self.sampling),
            "same_policy": self.same_policy,
            "timings": self.timings,
        }
        tensors = {k: x.contiguous() for k, x in self._tensors().items()}
        write_bytes(Path(path), save(tensors, {"trajectories": json.dumps(about)}))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Trajectories":
        """What ``save`` wrote."""
        try:
            with safe_open(path, framework="pt") as file:
                about: dict[str, Any] = json.loads((file.metadata() or {})["trajectories"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            _check_tensors(tensors)
            if not isinstance(about["seed"], int):
                raise TypeError(f"a seed of {about['seed']!r}")
            return cls(
                **{"support": None, **tensors},
                seed=about["seed"],
                schedule=Schedule(**about["schedule"]),
                sampling=Sampling(**about["sampling"]),
                same_policy=about["same_policy"],
                timings=about["timings"],
            )
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise InputError(f"{path}: must be saved trajectories, got {error}") from None


def _check_tensors(found: dict[str, Tensor]) -> None:
    """That tensors of a file fit together: ValueError or KeyError says what does not."""
    (b, length, s), a = found["codes"].shape, found["actions"].shape[-1]
    drawn, n = (b, length - 1, s), found["fed"].shape[-1]
    expected = {
        "codes": (torch.int64, (b, length, s)),
        "actions": (torch.int64, (b, length - 1, a)),
        "fed": (torch.int64, (b, n)),
        "step": (torch.int32, drawn),
        **dict.fromkeys(("logprob", "entropy"), (torch.float32, drawn)),
        **dict.fromkeys(("context", "frames", "group", "row_ids"), (torch.int64, (b,))),
    }
    if "support" in found:
        expected["support"] = (torch.uint8, (*drawn, found["support"].shape[-1]))
    for name, (dtype, shape) in expected.items():
        x = found[name]
        if x.dtype != dtype or x.shape != shape:
            raise ValueError(f"{name} of {x.dtype} and shape {tuple(x.shape)}")
    context, frames = found["context"], found["frames"]
    if not ((context >= 1) & (context <= frames) & (frames <= length)).all():
        raise ValueError("frames that do not fit the context or the codes")
