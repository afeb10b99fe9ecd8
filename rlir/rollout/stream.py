"""Where the tokens of a stream stand: slots of the cache, rotary positions, slot embeddings.

Legend: L frames, C of them given, S visual tokens, A action tokens, S' slots of an image, D hidden
size. Frame 0 is an image, every later frame an action block and an image.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rlir.models.world_model import WorldModelConfig
from rlir.rollout.groups import Group
from rlir.rollout.layout import known_tokens, layout_of
from rlir.rollout.sampling import Sampling
from rlir.rollout.schedule import Plan, Schedule
from rlir.rollout.trajectories import NOTHING, Trajectories


@dataclass(frozen=True)
class GivenTokens:
    """The tokens of a prompt in the order of their slots, int64 [T] each."""

    ids: Tensor
    embeds: Tensor
    """Slot within the block: action tokens first."""
    positions: Tensor
    slots: Tensor
    predict: Tensor
    """[(C - 1) S]: which of these tokens predicts a place of frames 1.. ."""

    def scatter(self, said: Tensor) -> Tensor:
        """What the stem says of each frame after the first, [C - 1, S, D], where tokens predict
        it: [T, D]."""
        out = said.new_zeros(len(self.ids), said.shape[2])
        out[self.predict] = said.flatten(0, 1)
        return out


def given_tokens(plan: Plan, action_tokens: int, codes: int, group: Group) -> GivenTokens:
    """A group's prompt. Tokens of actions count from ``codes``."""
    layout = layout_of(plan, action_tokens, group.context, group.context)
    slots = np.flatnonzero(layout.fed)
    known = known_tokens(group.codes[None], group.actions[None, : group.context - 1], codes)[0]
    return GivenTokens(
        ids=known[torch.from_numpy(layout.token[slots])],
        embeds=torch.from_numpy(layout.embed[slots]),
        positions=torch.from_numpy(layout.position[slots]),
        slots=torch.from_numpy(slots),
        predict=torch.from_numpy(np.searchsorted(slots, layout.predicts.reshape(-1))),
    )


def blank_trajectories(
    config: WorldModelConfig,
    groups: Sequence[Group],
    group_size: int,
    plan: Plan,
    *,
    schedule: Schedule,
    sampling: Sampling,
    seed: int,
    row_ids: Tensor,
    same_policy: bool = True,
) -> Trajectories:
    """Trajectories with all that is known before a token is drawn."""
    g, s, a = group_size, config.tokens, config.block - config.tokens
    length = max((group.frames for group in groups), default=1)
    b = len(groups) * g
    codes = torch.full((b, length, s), NOTHING)
    actions = torch.full((b, length - 1, a), NOTHING)
    step = torch.full((b, length - 1, s), NOTHING, dtype=torch.int32)
    steps = torch.tensor(plan.step_of(), dtype=torch.int32)
    for group in groups:
        rows = slice(group.index * g, (group.index + 1) * g)
        codes[rows, : group.context] = group.codes
        actions[rows, : group.frames - 1] = group.actions
        for t in range(group.context, group.frames):
            step[rows, t - 1] = steps + (t - group.context) * plan.steps
    support = None
    if sampling.truncates:
        support = torch.zeros(b, length - 1, s, -(-config.codes // 8), dtype=torch.uint8)
    return Trajectories(
        codes=codes,
        actions=actions,
        context=torch.tensor([x.context for x in groups], dtype=torch.int64).repeat_interleave(g),
        frames=torch.tensor([x.frames for x in groups], dtype=torch.int64).repeat_interleave(g),
        logprob=torch.zeros(b, length - 1, s),
        entropy=torch.zeros(b, length - 1, s),
        step=step,
        fed=torch.full((b, plan.slots + (length - 1) * (a + plan.slots)), NOTHING),
        group=torch.arange(len(groups)).repeat_interleave(g),
        row_ids=row_ids,
        support=support,
        seed=seed,
        schedule=schedule,
        sampling=sampling,
        same_policy=same_policy,
    )


def fed_tokens(plan: Plan, codes: int, drawn: Tensor, actions: Tensor, context: int) -> Tensor:
    """The token that was fed at every slot: drawn [B, L, S], actions [B, L - 1, A] to [B, T]."""
    layout = layout_of(plan, actions.shape[2], drawn.shape[1], context)
    out = known_tokens(drawn, actions, codes)[:, torch.from_numpy(layout.token)]
    out[:, torch.from_numpy(~layout.fed)] = NOTHING
    out[:, -1] = NOTHING  # the last token is fed to nothing
    return out
