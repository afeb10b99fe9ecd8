"""A clip as a schedule feeds it: which token stands at a slot, where, and what it predicts.

Legend: L frames, S visual tokens, A action tokens, S' slots of an image, N = S' + (L - 1)(A + S')
slots of a clip: image_0 | actions_1 image_1 | actions_2 image_2 | ... (``rlir.rollout.schedule``
says what a slot and a place are). The *known* tokens of a clip are its codes [L, S] and after them
its action tokens [L - 1, A], in one row.
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlir.rollout.schedule import Plan

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Step:
    """What goes through the model together."""

    slots: Indices
    """[T], of the clip, ascending."""
    predicting: Indices
    """[K]: which of them a token is drawn from."""
    places: Indices
    """[K]: the places that are drawn."""


@dataclass(frozen=True)
class Layout:
    """The slots of clips of one length, of which the first ``context`` frames were given."""

    plan: Plan
    action_tokens: int
    frames: int
    context: int
    fed: NDArray[np.bool_]
    """[N]: whether a token stands there. A frame that was given has no stand-ins."""
    token: Indices
    """[N]: which of the known tokens; 0 where none stands, and nothing sees that slot."""
    position: Indices
    """[N]: the rotary position, which is that of the place in a stream in raster order."""
    embed: Indices
    """[N]: the index of its slot embedding: action tokens, then places."""
    predicts: Indices
    """[L - 1, S]: the slot that a place of frames 1.. is predicted from."""

    def image(self, frame: int) -> int:
        """The first slot of a frame's image; its action block ends there."""
        return frame * (self.action_tokens + self.plan.slots)

    def offset(self, frame: int, place: int) -> int:
        """The raster position of a token, which numbers its draw."""
        return frame * (self.action_tokens + self.plan.rows * self.plan.columns) + place

    def steps(self, frame: int) -> list[Step]:
        """How a frame is generated. Its last token goes with the next frame's action block."""
        start = self.image(frame)
        left = 1 if frame > self.context else 0  # of the frame before; the context's is prefilled
        first = np.arange(start - self.action_tokens - left, start)
        steps = [Step(first, np.array([len(first) - 1]), np.array([0]))]
        for _, group in groupby(self.plan.feeds, lambda feed: feed.step):  # in order
            feeds = list(group)
            predicting = [i for i, feed in enumerate(feeds) if feed.predicts >= 0]
            steps.append(
                Step(
                    start + np.array([feed.slot for feed in feeds], np.int64),
                    np.array(predicting, np.int64),
                    np.array([feeds[i].predicts for i in predicting], np.int64),
                )
            )
        return steps


@lru_cache(maxsize=64)
def layout_of(plan: Plan, action_tokens: int, frames: int, context: int) -> Layout:
    """The slots of clips of ``frames`` frames under a plan."""
    s, a = plan.rows * plan.columns, action_tokens
    # As if the first image had an action block too.
    fed = np.zeros((frames, a + plan.slots), bool)
    token, position, embed = np.zeros((3, *fed.shape), np.int64)
    predicts = np.zeros((frames, s), np.int64)
    for f in range(frames):
        fed[f, :a] = True
        token[f, :a] = frames * s + (f - 1) * a + np.arange(a)
        position[f, :a] = f * (a + s) - a + np.arange(a)
        embed[f, :a] = np.arange(a)
        if f < context:
            slots = [(plan.slot_of(p), p, f * s + p, p + 1) for p in range(s)]
        else:
            slots = [
                (x.slot, x.place, x.place if x.stands_in else f * s + x.place, x.predicts)
                for x in plan.feeds
            ]
            slots.append((plan.slots - 1, s - 1, f * s + s - 1, -1))
        predicts[f, 0] = f * (a + plan.slots) - 1
        for slot, place, known, predicted in slots:
            fed[f, a + slot] = True
            token[f, a + slot] = known
            position[f, a + slot] = f * (a + s) + place
            embed[f, a + slot] = a + place
            if 0 <= predicted < s:
                predicts[f, predicted] = f * (a + plan.slots) + slot
    return Layout(
        *(plan, a, frames, context),
        fed=fed.reshape(-1)[a:],
        token=token.reshape(-1)[a:],
        position=position.reshape(-1)[a:],
        embed=embed.reshape(-1)[a:],
        predicts=predicts[1:],
    )


def known_tokens(codes: Tensor, actions: Tensor, vocabulary: int) -> Tensor:
    """codes [B, L, S] and action tokens [B, L - 1, A], counted from 0, in one row, as ids."""
    return torch.cat([codes.flatten(1), actions.flatten(1) + vocabulary], 1)
