"""The inverse reward: actions read off a video against the actions that were commanded.

R = (1 / n) sum_t sum_f w_f m_tf / sum_f w_f, with m = 1 where the reading is the command, else 0
(RLIR, arXiv 2509.23958)
"""

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from rlir import _library
from rlir.actions.heads import ActionHeads
from rlir.actions.space import ActionSpace
from rlir.errors import InputError
from rlir.ops._action_heads import Actions, heads_of, read, rows
from rlir.tracing import traced

RewardMode = Literal["factor", "joint"]
_MODES = get_args(RewardMode)


@traced
def inverse_reward(
    button_logits: Tensor | None,
    camera_logits: Tensor | None,
    actions: Tensor | Actions,
    space: ActionSpace | ActionHeads,
    *,
    mode: RewardMode = "factor",
    weights: Sequence[float] | None = None,
    frame_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One reward a trajectory: how far an inverse dynamics model reads what was commanded.

    With m_tf = 1 if the reading of factor f in frame t (``decode_actions``) is the commanded
    class, else 0, over the n frames of the mask:

    - ``mode="factor"``: R = sum_t sum_f w_f m_tf / (n sum_f w_f)
    - ``mode="joint"``: R = the share of frames in which m_tf = 1 for every f with w_f > 0

    Args:
        button_logits: [B, T, ...], as of ``decode_actions``.
        camera_logits: [B, T, ...], as of ``decode_actions``.
        actions: what was commanded: int64 [B, T, factors] of classes of the *space* (a bin of
            another quantiser is taken at its centre and quantised again with the heads' bins), or
            ``Actions``, whose float32 ``degrees`` [B, T, axes] then stand for the camera's classes.
        space: an action space, or ``ActionHeads``, as of ``decode_actions``.
        mode: a match per factor (dense, the default), or of the whole action.
        weights: of each factor, finite, >= 0, not all 0; all 1 by default.
        frame_mask: bool [B, T]; frames that are False take no part, whatever their logits and
            commands are.

    Returns:
        ``reward`` float32 [B] and ``matches`` float32 [B, T, factors]: 1, 0, NaN where a factor
        cannot be read because a logit is not finite, and 0 in masked frames. A NaN match (of
        whatever weight) makes its trajectory's reward NaN: a broken IDM must not pass for one that
        read something else. A trajectory without frames has NaN as well: there is no evidence.
        ``group_advantage`` leaves NaN out. No gradient flows back. Matches are counted as
        integers, so the bits depend on the trajectory alone: not on batch, threads or instruction
        set; the CUDA kernel is written to give those of the CPU.

    Raises:
        InputError: (a ValueError) inputs that do not fit together, or, on the CPU, a command that
            the space does not have, in one line. On CUDA, where looking would wait for the device,
            such a command gives NaN and an assertion fails on the device.
    """
    heads = heads_of(space)
    keys, camera, classes, degrees, ws = _check(
        button_logits, camera_logits, actions, heads, mode, weights, frame_mask
    )
    if not _library.has_kernels(keys):
        return _reference(keys, camera, classes, degrees, heads, mode, ws, frame_mask)
    tables = heads.tables
    try:
        out: tuple[Tensor, Tensor] = torch.ops.rlir.inverse_reward.default(
            keys.detach(),
            camera.detach(),
            classes,
            degrees,
            frame_mask,
            axis_sizes=tables.axis_sizes,
            group_sizes=tables.group_sizes,
            button_classes=tables.button_classes,
            button_opponents=tables.button_opponents,
            command_sizes=tables.command_sizes,
            command_classes=tables.command_classes,
            edges=tables.edges,
            weights=ws,
            mode=mode,
        )
    except RuntimeError as error:
        if str(error).startswith("inverse_reward: "):  # what only a look at the commands can tell
            raise InputError(str(error).splitlines()[0]) from None
        raise
    return out


def inverse_reward_reference(
    button_logits: Tensor | None,
    camera_logits: Tensor | None,
    actions: Tensor | Actions,
    space: ActionSpace | ActionHeads,
    *,
    mode: RewardMode = "factor",
    weights: Sequence[float] | None = None,
    frame_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``inverse_reward`` in plain PyTorch, on any device: what the kernels are held to."""
    heads = heads_of(space)
    keys, camera, classes, degrees, ws = _check(
        button_logits, camera_logits, actions, heads, mode, weights, frame_mask
    )
    return _reference(keys, camera, classes, degrees, heads, mode, ws, frame_mask)


def _reference(
    keys: Tensor,
    camera: Tensor,
    actions: Tensor,
    degrees: Tensor | None,
    heads: ActionHeads,
    mode: str,
    weights: tuple[float, ...],
    frame_mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    tables, axes = heads.tables, len(heads.axes)
    counts = torch.ones_like(actions[..., 0], dtype=torch.bool)
    if frame_mask is not None:
        counts = frame_mask
    columns, start = [], 0
    for f, size in enumerate(tables.command_sizes):
        if degrees is not None and f < axes:
            columns.append(_bin(degrees[..., f], counts, heads.axes[f].edges().tolist()))
        else:
            wanted = actions[..., f].where(counts, 0)
            outside = (wanted < 0) | (wanted >= size)
            if outside.device.type == "cpu" and outside.any():
                raise InputError(
                    f"inverse_reward: actions of factor {f} must be from 0 and below {size}, "
                    f"got {int(wanted[outside][0])}"
                )
            table = torch.tensor(tables.command_classes[start : start + size], device=wanted.device)
            # Where looking would wait for a GPU, a command that does not exist gives NaN.
            columns.append(table[wanted.where(~outside, 0)].where(~outside, -1))
        start += size
    commanded, found = torch.stack(columns, -1), read(keys, camera, heads)
    broken = (found < 0) | (commanded < 0)
    matches = (found == commanded).float().masked_fill(broken, math.nan)
    matches = matches.where(counts[..., None], 0)
    w = torch.tensor(weights, dtype=torch.float64, device=keys.device)
    frames = counts.sum(1)
    if mode == "joint":
        score = (matches[..., w > 0] == 1).all(-1) & counts
        reward = score.sum(1).double() / frames
    else:
        reward = (matches.double() * w).sum((1, 2)) / (w.sum() * frames)
    reward = reward.masked_fill(matches.isnan().flatten(1).any(1), math.nan)
    return reward.float(), matches


def _bin(degrees: Tensor, counts: Tensor, edges: Sequence[float]) -> Tensor:
    x = degrees.double().where(counts, 0)
    if x.device.type == "cpu" and x.isnan().any():
        raise InputError("inverse_reward: degrees must not be NaN, got NaN")
    edge = torch.tensor(edges, dtype=torch.float64, device=x.device)
    steps = (x[..., None] >= edge).sum(-1) - (x[..., None] <= -edge).sum(-1)
    return (steps + len(edge)).where(~x.isnan(), -1)


def _check(
    button_logits: Tensor | None,
    camera_logits: Tensor | None,
    actions: Tensor | Actions,
    heads: ActionHeads,
    mode: str,
    weights: Sequence[float] | None,
    frame_mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, tuple[float, ...]]:
    keys, camera, shape = rows("inverse_reward", button_logits, camera_logits, heads)
    if len(shape) != 2:
        raise InputError(
            f"inverse_reward: logits must be [trajectories, frames, ...], got leading shape "
            f"{tuple(shape)}"
        )
    factors = len(heads.tables.command_sizes)
    degrees = None
    if isinstance(actions, tuple):
        actions, degrees = actions
    wanted: list[tuple[str, Tensor | None, torch.dtype, tuple[int, ...]]] = [
        ("actions", actions, torch.int64, (*shape, factors)),
        ("degrees", degrees, torch.float32, (*shape, len(heads.axes))),
        ("frame_mask", frame_mask, torch.bool, tuple(shape)),
    ]
    for name, tensor, dtype, expected in wanted:
        if tensor is None:
            continue
        if tensor.dtype != dtype:
            raise InputError(f"inverse_reward: {name} must be {dtype}, got {tensor.dtype}")
        if tuple(tensor.shape) != expected:
            raise InputError(
                f"inverse_reward: {name} must have shape {expected}, got {tuple(tensor.shape)}"
            )
        if tensor.device != keys.device:
            raise InputError(
                f"inverse_reward: {name} must be on {keys.device}, got {tensor.device}"
            )
    ws = (1.0,) * factors if weights is None else tuple(float(w) for w in weights)
    if len(ws) != factors:
        raise InputError(f"inverse_reward: weights must be {factors} numbers, got {len(ws)}")
    for w in ws:
        if not 0 <= w < math.inf:
            raise InputError(f"inverse_reward: weights must be finite and >= 0, got {w}")
    if not 0 < sum(ws) < math.inf:
        raise InputError(f"inverse_reward: weights must have a finite sum above 0, got {sum(ws)}")
    if mode not in _MODES:
        raise InputError(f"inverse_reward: mode must be 'factor' or 'joint', got {mode!r}")
    return keys, camera, actions, degrees, ws


if _library.PATH is not None:

    @torch.library.register_fake("rlir::inverse_reward")
    def _fake(
        button_logits: Tensor,
        camera_logits: Tensor,
        actions: Tensor,
        degrees: Tensor | None = None,
        frame_mask: Tensor | None = None,
        *,
        axis_sizes: list[int],
        group_sizes: list[int],
        button_classes: list[int],
        button_opponents: list[int],
        command_sizes: list[int],
        command_classes: list[int],
        edges: list[float],
        weights: list[float],
        mode: str = "factor",
    ) -> tuple[Tensor, Tensor]:
        b, t, _ = button_logits.shape
        factors = len(axis_sizes) + len(group_sizes)
        return (
            button_logits.new_empty(b, dtype=torch.float32),
            button_logits.new_empty((b, t, factors), dtype=torch.float32),
        )
