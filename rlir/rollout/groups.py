"""Groups of rollouts and their turn: as many at once as memory has places for."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlir.errors import InputError
from rlir.models.world_model import WorldModelConfig
from rlir.rollout.sampling import Sampling
from rlir.rollout.schedule import Plan
from rlir.rollout.trajectories import Prompt, Trajectories

OnGroup = Callable[[int, Trajectories], object]
KEYS = 128
"""Slots of a block of keys: csrc/cpu/video_attention.h."""


@dataclass
class Group:
    """The rollouts of one prompt, on their way."""

    index: int
    """Of the prompt."""
    codes: Tensor
    """Context frames, int64 [C, S]."""
    actions: Tensor
    """Action tokens of every frame after the first, int64 [L - 1, A], counted from 0."""
    frame: int = 0
    """The frame that is drawn next."""
    slot: int = -1
    """Its place in the caches."""

    @property
    def context(self) -> int:
        return len(self.codes)

    @property
    def frames(self) -> int:
        return len(self.actions) + 1


def groups_of(
    config: WorldModelConfig,
    action_ids: Callable[[Tensor], Tensor],
    prompts: Sequence[Prompt],
    group_size: int,
    frames: int | None,
) -> list[Group]:
    """One a prompt, to draw at most ``frames`` frames; refuses what cannot be rolled out."""
    if group_size < 1:
        raise InputError(f"rollout: group_size must be >= 1, got {group_size}")
    if frames is not None and frames < 0:
        raise InputError(f"rollout: frames must be at least 0 or None, got {frames}")
    out = []
    for index, prompt in enumerate(prompts):
        if prompt.codes.shape[1] != config.tokens:
            raise InputError(
                f"rollout: prompts must have {config.tokens} tokens a frame, "
                f"got {prompt.codes.shape[1]}"
            )
        low, high = torch.aminmax(prompt.codes)
        if not 0 <= int(low) <= int(high) < config.codes:
            raise InputError(
                f"rollout: codes must be from 0 and below {config.codes}, "
                f"got {int(low)} to {int(high)}"
            )
        given = prompt.context - 1
        most = len(prompt.actions) if frames is None else min(len(prompt.actions), given + frames)
        out.append(Group(index, prompt.codes, action_ids(prompt.actions[:most])))
    return out


@dataclass(frozen=True)
class Request:
    """A call of ``rollout``, checked."""

    groups: list[Group]
    group_size: int
    plan: Plan
    sampling: Sampling
    seed: int
    row_ids: Tensor
    window: int | None
    on_group: OnGroup | None

    @property
    def length(self) -> int:
        """Frames of the longest rollout."""
        return max((group.frames for group in self.groups), default=1)


class Pool:
    """Places in the caches. Which group has which changes no bit."""

    def __init__(self, groups: Sequence[Group], places: int, group_size: int):
        # The longest first, so that none of them is left to roll alone in the end.
        waiting = [x for x in groups if x.frames > x.context]
        self._waiting = sorted(waiting, key=lambda x: x.context - x.frames)
        self._free = list(range(places))[::-1]
        self.active: list[Group] = []
        self._done_already = [x for x in groups if x.frames == x.context]

    @property
    def busy(self) -> bool:
        return bool(self._waiting or self.active or self._done_already)

    def admit(self) -> list[Group]:
        """Groups that begin now."""
        new = []
        while self._waiting and self._free:
            group = self._waiting.pop(0)
            group.slot, group.frame = self._free.pop(), group.context
            new.append(group)
        # Members of the caches in order: what is next to each other there is read so.
        self.active = sorted([*self.active, *new], key=lambda x: x.slot)
        return new

    def advance(self) -> list[Group]:
        """A frame was drawn; groups that are done."""
        done, self._done_already = self._done_already, []
        for group in self.active:
            group.frame += 1
            if group.frame == group.frames:
                done.append(group)
                self._free.append(group.slot)
        self.active = [x for x in self.active if x.frame < x.frames]
        return done
