"""The world model on groups of clips that begin alike: what they share goes through it once.

Row by row a layer does the same to every token, so the tokens of all prompts and all continuations
lie in one row; attention alone knows which is whose (``group_attention``). On the CPU the states
have the bits of ``WorldModel.hidden`` on whole clips; a gradient through a prompt is the sum over
its group.

Legend: B clips, L frames, C frames that were given, S visual tokens a frame, A action tokens,
n groups, P slots of a prompt (C images and C action blocks), T of a continuation, D hidden size.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from rlir.errors import InputError
from rlir.models.stem import engine_stem
from rlir.models.world_model import WorldModel, operand_dtype
from rlir.ops import Mask, causal, group_attention
from rlir.rollout.layout import Layout, known_tokens, layout_of
from rlir.rollout.schedule import Schedule, sequential


def group_hidden(
    model: WorldModel,
    codes: Tensor,
    actions: Tensor,
    sizes: Sequence[int],
    *,
    schedule: Schedule | None = None,
    context: int = 1,
) -> Tensor:
    """Final hidden states that predict the visual tokens of frames C.., [B, L - C, S, D].

    Args:
        codes: int64 [B, L, S]; actions: token blocks int64 [B, L - 1, A], counted from 0.
        sizes: how many consecutive clips a group has, at least 1 each, B together. Clips of a group
            have their first C frames and C action blocks in common.
        schedule: under which frames were drawn, as in ``WorldModel.hidden``.
        context: C, from 1 to L - 1.

    Raises:
        InputError: sizes, frames or groups that do not fit, in one line.
    """
    rows, length = codes.shape[:2]
    if not 1 <= context < length:
        raise InputError(f"group_hidden: context must be from 1 to {length - 1}, got {context}")
    if min(sizes, default=1) < 1 or sum(sizes) != rows:
        raise InputError(
            f"group_hidden: sizes must be at least 1 and {rows} together, got {list(sizes)}"
        )
    counts = torch.tensor(sizes, dtype=torch.int64)
    group = torch.arange(len(sizes)).repeat_interleave(counts).to(codes.device)
    first = (counts.cumsum(0) - counts).to(codes.device)
    for name, x in (("frames", codes), ("action blocks", actions)):
        if not x[:, :context].equal(x[first[group], :context]):
            raise InputError(f"group_hidden: clips of a group must share {context} {name}")
    return _hidden(model, codes, actions, sizes, first, group, schedule, context)


def _hidden(
    model: WorldModel,
    codes: Tensor,
    actions: Tensor,
    sizes: Sequence[int],
    first: Tensor,
    group: Tensor,
    schedule: Schedule | None,
    context: int,
) -> Tensor:
    config, length = model.config, codes.shape[1]
    plan = (schedule or sequential()).plan(config.rows, config.columns)
    window = config.frames if length > config.frames else None
    layout = layout_of(plan, model.action_tokens, length, context)
    p, rows = layout.image(context), len(codes)
    # The last token is fed to nothing.
    token, position, slots = (
        torch.from_numpy(x[:-1]).to(codes.device)
        for x in (layout.token, layout.position, layout.embed)
    )
    known = known_tokens(codes, actions, config.codes)

    def joined(prompt: Tensor, rest: Tensor) -> Tensor:
        """[P] of every prompt and then [T] of every continuation, in one row."""
        return torch.cat([prompt.repeat(len(sizes)), rest.repeat(rows)])

    prompts = known[first].index_select(1, token[:p])
    rest = known.index_select(1, token[p:])
    ids = torch.cat([prompts.flatten(), rest.flatten()])
    x = model.embed_at(ids[None], joined(slots[:p], slots[p:]))[0]
    if model.stem is not None:
        x = x + _stem(model, codes, actions, first, group, layout, len(token) - p)
    table = model.rotary_until(int(layout.position.max()) + 1)
    table = table.index_select(1, joined(position[:p], position[p:]))
    mask = plan.mask(model.action_tokens, context, window)
    if plan.raster and window is None:
        mask = causal()
    attention = GroupAttention(sizes, p, len(token) - p, mask)
    x = model.decode(x[None], table, attention)[0]
    prompt, rest = x.split([len(sizes) * p, len(x) - len(sizes) * p])
    last = prompt.unflatten(0, (len(sizes), p))[:, -1]
    # A continuation's first token is predicted by the last of its prompt.
    states = torch.cat([last[group][:, None], rest.unflatten(0, (rows, -1))], 1)
    out: Tensor = model.norm(_predicting(states, layout))
    return out


def _stem(
    model: WorldModel,
    codes: Tensor,
    actions: Tensor,
    first: Tensor,
    group: Tensor,
    layout: Layout,
    slots: int,
) -> Tensor:
    """What it adds to the tokens, [n P + B T, D]: of frames 1 .. C once a group."""
    assert model.stem is not None
    c, n, rows = layout.context, len(first), len(codes)
    later = codes.shape[1] - 1 - c
    seen = torch.cat([codes[first, :c].flatten(0, 1), codes[:, c:-1].flatten(0, 1)])
    under = torch.cat([actions[first, :c].flatten(0, 1), actions[:, c:].flatten(0, 1)])
    out = engine_stem(model.stem, seen, under, operand_dtype(model.embed_tokens.weight))
    once, own = out.split([n * c, rows * later])
    once = once.unflatten(0, (n, c))
    drawn = torch.cat([once[group, -1:], own.unflatten(0, (rows, later))], 1)
    start = layout.image(1) - 1
    prompts = F.pad(_spread(once, layout, 1, layout.image(c) - start), (0, 0, start, 0))
    rest = _spread(drawn, layout, c, slots + 1)[:, 1:]
    return torch.cat([prompts.flatten(0, 1), rest.flatten(0, 1)])


def _places(layout: Layout, first: int, frames: int) -> NDArray[np.int64]:
    """From where frames first .. are predicted, [frames S], counted from the first of it."""
    places = layout.predicts[first - 1 : first - 1 + frames].reshape(-1)
    return places - places[0]


def _predicting(states: Tensor, layout: Layout) -> Tensor:
    """Of states [B, 1 + T, D] those that predict, [B, L - C, S, D]."""
    frames, s = layout.frames - layout.context, layout.predicts.shape[1]
    if not layout.plan.raster:
        places = torch.from_numpy(_places(layout, layout.context, frames)).to(states.device)
        return states.index_select(1, places).unflatten(1, (frames, s))
    # S of every block, one after the other.
    padded = F.pad(states, (0, 0, 0, layout.action_tokens))
    return padded.unflatten(1, (frames, -1))[:, :, :s]


def _spread(x: Tensor, layout: Layout, first: int, slots: int) -> Tensor:
    """x [B, frames, S, D] of frames first .. where their tokens are predicted from, else zeros:
    [B, slots, D], of which the first one predicts the first token.
    """
    if layout.plan.raster:
        return F.pad(x, (0, 0, 0, layout.action_tokens)).flatten(1, 2)[:, :slots]
    places = _places(layout, first, x.shape[1])
    within = np.flatnonzero(places < slots)
    index, kept = (torch.from_numpy(i).to(x.device) for i in (places[within], within))
    zeros = x.new_zeros(len(x), slots, x.shape[-1])
    return zeros.index_add(1, index, x.flatten(1, 2).index_select(1, kept))


class GroupAttention:
    """Attention of tokens in one row: P of every prompt, then T of every continuation."""

    def __init__(self, sizes: Sequence[int], prompt: int, rest: int, mask: Mask):
        self.prompt, self.rest, self.mask = prompt, rest, mask
        # A call takes groups of one size.
        self.calls = [(len(sizes), sizes[0])] if len(set(sizes)) == 1 else [(1, g) for g in sizes]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[1, n P + B T, heads, d] each."""
        prompts = [groups * self.prompt for groups, _ in self.calls]
        rests = [groups * size * self.rest for groups, size in self.calls]
        parts = [x[0].split([*prompts, *rests]) for x in (q, k, v)]
        out: list[Tensor] = []
        ends: list[Tensor] = []
        for i, (groups, size) in enumerate(self.calls):
            shared = [x[i].unflatten(0, (groups, self.prompt)) for x in parts]
            own = [x[i + len(self.calls)].unflatten(0, (groups * size, self.rest)) for x in parts]
            a, b = group_attention(*shared, *own, group_size=size, mask=self.mask)
            out.append(a.flatten(0, 1))
            ends.append(b.flatten(0, 1))
        return torch.cat([*out, *ends])[None]
