"""What ``decode_actions`` and ``inverse_reward`` share: checks and reading heads in PyTorch."""

from typing import NamedTuple

import torch
from torch import Tensor

from rlir.actions.heads import ActionHeads
from rlir.actions.space import SPACES, ActionSpace
from rlir.errors import InputError

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Made beforehand: torch.compile would trace the making.
_HEADS = {space: ActionHeads(space, space.axes) for space in SPACES.values()}


class Actions(NamedTuple):
    """Actions as classes and, for the camera, in degrees."""

    classes: Tensor
    """int64 [..., factors]: a bin of each camera axis, then a class of each key group."""
    degrees: Tensor
    """float32 [..., axes]."""


def heads_of(space: ActionSpace | ActionHeads) -> ActionHeads:
    """A space by itself stands for an IDM with a class vector for each of its factors.

    Code under torch.compile passes ``ActionHeads``, or one of the named spaces.
    """
    if isinstance(space, ActionHeads):
        return space
    found = _HEADS.get(space)
    if found is None:
        found = _HEADS[space] = ActionHeads(space, space.axes)
    return found


def rows(
    op: str, button_logits: Tensor | None, camera_logits: Tensor | None, heads: ActionHeads
) -> tuple[Tensor, Tensor, torch.Size]:
    """Both logits as [..., classes], and the leading shape. Checks them."""
    tables = heads.tables
    bins, classes = sum(tables.axis_sizes), sum(tables.group_sizes)
    split = None  # of a single axis it could be taken for a leading dimension of 1
    if len(tables.axis_sizes) > 1 and len(set(tables.axis_sizes)) == 1:
        split = (len(tables.axis_sizes), tables.axis_sizes[0])
    camera = _flat(op, "camera_logits", camera_logits, bins, split)
    if heads.buttons is None:
        keys = _flat(op, "button_logits", button_logits, classes, None)
    else:
        n = len(heads.buttons)
        keys = _flat(op, "button_logits", button_logits, 2 * n, (n, 2) if n > 1 else None)
    if keys is None and camera is None:
        raise InputError(f"{op}: there must be button_logits or camera_logits, got neither")
    if camera is None:
        assert keys is not None
        camera = keys.new_empty((*keys.shape[:-1], 0))
    if keys is None:
        keys = camera.new_empty((*camera.shape[:-1], 0))
    if keys.shape[:-1] != camera.shape[:-1]:
        raise InputError(
            f"{op}: camera_logits must have the leading shape of button_logits, "
            f"{tuple(keys.shape[:-1])}, got {tuple(camera.shape[:-1])}"
        )
    if keys.device != camera.device:
        raise InputError(f"{op}: camera_logits must be on {keys.device}, got {camera.device}")
    return keys, camera, keys.shape[:-1]


def _flat(
    op: str, name: str, x: Tensor | None, classes: int, split: tuple[int, int] | None
) -> Tensor | None:
    if x is None:
        if classes:
            raise InputError(f"{op}: {name} must be a tensor, got None")
        return None
    if x.dtype not in _DTYPES:
        raise InputError(
            f"{op}: {name} must be float64, float32, bfloat16 or float16, got {x.dtype}"
        )
    if split is not None and x.dim() >= 2 and tuple(x.shape[-2:]) == split:
        return x.flatten(-2)
    if x.dim() >= 1 and x.shape[-1] == classes:
        return x
    either = f"[..., {split[0]}, {split[1]}] or " if split else ""
    raise InputError(f"{op}: {name} must have shape {either}[..., {classes}], got {tuple(x.shape)}")


def read(keys: Tensor, camera: Tensor, heads: ActionHeads) -> Tensor:
    """Classes int64 [..., factors] that the heads say, -1 where a logit is not finite."""
    tables = heads.tables
    columns = [_largest(x) for x in camera.split(tables.axis_sizes, -1)] if camera.shape[-1] else []
    if heads.buttons is None:
        if keys.shape[-1]:
            columns += [_largest(x) for x in keys.split(tables.group_sizes, -1)]
        return torch.stack(columns, -1)
    pair = keys.unflatten(-1, (-1, 2))
    held = pair[..., 1] > pair[..., 0]  # [..., buttons]
    readable = pair.isfinite().flatten(-2).all(-1)
    opponents = torch.tensor(
        [
            [o >> i & 1 for i in range(len(tables.button_opponents))]
            for o in tables.button_opponents
        ],
        dtype=torch.bool,
        device=keys.device,
    )
    counts = held & ~(held[..., None, :] & opponents).any(-1)
    start = 0
    for size in tables.group_sizes:
        group = torch.zeros_like(readable, dtype=torch.int64)
        for b, place in enumerate(tables.button_classes):
            if start < place < start + size:
                group = torch.where(counts[..., b], place - start, group)
        columns.append(group.where(readable, -1))
        start += size
    return torch.stack(columns, -1)


def _largest(x: Tensor) -> Tensor:
    return x.argmax(-1).where(x.isfinite().all(-1), -1)
