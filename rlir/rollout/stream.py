"""Where the tokens of a stream stand: slots of the cache, rotary positions, slot embeddings.

Legend: L frames, C of them given, S visual tokens, A action tokens, S' slots of an image, D hidden
size. Frame 0 is an image, every later frame an action block and an image.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlir.models.world_model import WorldModelConfig
from rlir.rollout.groups import Group
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
    predicts: Tensor
    """Frame and place that a token's hidden state predicts, (frame - 1) S + place, or -1."""

    def scatter(self, said: Tensor) -> Tensor:
        """What the stem says of each frame after the first, [C - 1, S, D], where tokens predict
        it: [T, D]."""
        rows = torch.cat([said.flatten(0, 1), said.new_zeros(1, said.shape[2])])
        return rows[self.predicts]


def given_tokens(plan: Plan, action_tokens: int, codes: int, group: Group) -> GivenTokens:
    """A group's prompt. Tokens of actions count from ``codes``."""
    s, a = plan.rows * plan.columns, action_tokens
    place = torch.arange(s)
    slot_of = torch.tensor([plan.slot_of(i) for i in range(s)])
    parts: list[tuple[Tensor, ...]] = []
    for t in range(group.context):
        position, slot = s + (t - 1) * (a + s), plan.slots + (t - 1) * (a + plan.slots)
        if t > 0:
            action = torch.arange(a)
            first = torch.full((a,), -1)
            first[-1] = (t - 1) * s
            parts.append(
                (group.actions[t - 1] + codes, action, position + action, slot + action, first)
            )
            position, slot = position + a, slot + a
        else:
            position = slot = 0
        follows = torch.where(place + 1 < s, (t - 1) * s + place + 1, -1)
        predicts = follows if t > 0 else torch.full((s,), -1)
        parts.append((group.codes[t], a + place, position + place, slot + slot_of, predicts))
    return GivenTokens(*(torch.cat(x).contiguous() for x in zip(*parts, strict=True)))


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
    b, length, s = drawn.shape
    a = actions.shape[2]
    slot_of = torch.tensor([plan.slot_of(i) for i in range(s)])
    out = torch.full((b, plan.slots + (length - 1) * (a + plan.slots)), NOTHING)
    feeds = torch.tensor([(x.slot, x.place) for x in plan.feeds if not x.stands_in])
    standing = torch.tensor([(x.slot, x.place) for x in plan.feeds if x.stands_in])
    for t in range(length):
        start = 0
        if t > 0:
            start = plan.slots + (t - 1) * (a + plan.slots)
            out[:, start : start + a] = actions[:, t - 1] + codes
            start += a
        if t < context:
            out[:, start + slot_of] = drawn[:, t]
            continue
        if len(feeds):
            out[:, start + feeds[:, 0]] = drawn[:, t, feeds[:, 1]]
        if len(standing):
            out[:, start + standing[:, 0]] = drawn[:, 0, standing[:, 1]]
        if t + 1 < length:  # the last one goes with the next action block
            out[:, start + plan.slots - 1] = drawn[:, t, -1]
    return out
