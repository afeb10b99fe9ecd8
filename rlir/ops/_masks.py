"""Masks of the attention ops: small descriptions, never a Tq x Tk tensor.

The stream: frame 0 is an image of S tokens; every later frame is a block of A action tokens and an
image. csrc/core/reach.h is the same in native code.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from rlir.errors import InputError

_NUMBERS = {
    "causal": {"window_tokens": 0},
    "frame_causal": {"tokens_per_frame": 1, "action_tokens": 0, "window_frames": 0},
    "diagonal": {
        "rows": 1,
        "columns": 1,
        "window": 1,
        "action_tokens": 0,
        "window_frames": 0,
        "context_frames": 0,
        "refresh": 0,
    },
}
"""The numbers of each kind in their order, and the least each may be."""
_LIMIT = 2**31
_FAR = 2**62
"""Positions beyond see what this one sees: sums with it are still integers of 64 bits."""


@dataclass(frozen=True)
class Mask:
    """Which keys a query sees. Made by ``causal``, ``frame_causal`` and ``diagonal``."""

    kind: str
    """"causal", "frame_causal" or "diagonal"."""
    numbers: tuple[int, ...]
    """The arguments of that function, in order; a window of None is 0, refresh is 0 or 1."""

    def __post_init__(self) -> None:
        names = _NUMBERS.get(self.kind)
        if names is None:
            raise InputError(f"Mask: kind must be one of {', '.join(_NUMBERS)}, got {self.kind!r}")
        if not isinstance(self.numbers, tuple) or len(self.numbers) != len(names):
            raise InputError(
                f"{self.kind}: numbers must be ({', '.join(names)}), got {self.numbers}"
            )
        for (name, least), value in zip(names.items(), self.numbers, strict=True):
            _check(self.kind, name, value, least)
        if self.kind == "diagonal":
            rows, columns, window = self.numbers[:3]
            refresh = self.numbers[6]
            if window > columns:
                raise InputError(f"diagonal: window must be <= columns, got {window} > {columns}")
            if refresh > 1:
                raise InputError(f"diagonal: refresh must be 0 or 1, got {refresh}")
            if refresh and window == columns:
                raise InputError(
                    f"diagonal: window must be < columns with refresh, got {window} of {columns}"
                )
            if _slots(rows, columns, refresh) >= _LIMIT:
                raise InputError(
                    "diagonal: rows x columns must be below 2^31"
                    f"{', with a slot more a row' if refresh else ''}, got {rows} x {columns}"
                )


def causal(window_tokens: int | None = None) -> Mask:
    """A query sees itself and what is before it, or the last ``window_tokens`` of that."""
    return Mask("causal", (_window("causal", "window_tokens", window_tokens),))


def frame_causal(
    tokens_per_frame: int, action_tokens: int = 0, window_frames: int | None = None
) -> Mask:
    """A query of an image sees all of its frame and the frames before; an action token is causal.

    For diffusion models and encoders: an autoregressive model would see its own targets.

    Args:
        tokens_per_frame: S, tokens of an image.
        action_tokens: A, tokens before every image but the first.
        window_frames: how many frames are seen, the query's own with its actions among them.
    """
    window = _window("frame_causal", "window_frames", window_frames)
    return Mask("frame_causal", (tokens_per_frame, action_tokens, window))


def diagonal(
    rows: int,
    columns: int,
    window: int,
    action_tokens: int = 0,
    window_frames: int | None = None,
    context_frames: int = 1,
    refresh: bool = False,
) -> Mask:
    """What a token saw when it was drawn by diagonal decoding (arXiv 2503.14070).

    Row r + 1 of an image begins once row r has ``window`` tokens, w, and every row under way
    advances by one token a step. Slot (r, c) is fed to the model at step tau = r w + c + 1. The
    last column is another matter: row r + 1 begins by feeding row r's last slot, at (r + 1) w, with
    a stand-in for the token that is not drawn yet; only the image's last slot is fed with its own
    token, when the next action block is. A query sees a key of its image if that is not after it in
    raster order and not fed later, tau(key) <= tau(query), and all that is before its image.

    With ``refresh`` the last token of a row is fed as well, once it is drawn, into a slot of its
    own, and the stand-in is seen no longer. Every row but the last has C + 1 slots: those of
    columns 0 to C - 2, the stand-in's, fed at (r + 1) w, and the last token's, fed at r w + C. A
    query of a generated image sees a stand-in of its image if (r + 1) w <= tau(query) < r w + C;
    nothing else ever sees one: not later frames, nor context frames, where that slot holds nothing.

    Args:
        rows, columns: of an image; S is their product, with ``refresh`` rows - 1 more.
        window: w, from 1 to ``columns``; ``columns`` is raster order, one token after the other.
        action_tokens: A, tokens before every image but the first.
        window_frames: how many frames are seen, the query's own with its actions among them.
        context_frames: the first frames, which were not drawn but given: causal.
        refresh: whether drawn tokens take the place of stand-ins; ``window`` is below ``columns``.
    """
    frames = _window("diagonal", "window_frames", window_frames)
    if not isinstance(refresh, bool):
        raise InputError(f"diagonal: refresh must be True or False, got {refresh!r}")
    numbers = (rows, columns, window, action_tokens, frames, context_frames, int(refresh))
    return Mask("diagonal", numbers)


def visible(mask: Mask, q_positions: Tensor, keys: int) -> Tensor:
    """Whether queries at int64 [..., Tq] see key slots 0 .. ``keys`` - 1: bool [..., Tq, keys].

    What the kernels are held to. A position before 0 sees nothing.
    """
    return sees(mask, q_positions, torch.arange(keys, device=q_positions.device))


def sees(mask: Mask, q_positions: Tensor, k_positions: Tensor) -> Tensor:
    """``visible`` for keys at any positions: int64 [..., Tq], [..., Tk], bool [..., Tq, Tk]."""
    q = q_positions.clamp(-1, _FAR).unsqueeze(-1)
    k = k_positions.unsqueeze(-2)
    before = k <= q
    if mask.kind == "causal":
        (window,) = mask.numbers
        return before & (k > q - window) if window else before
    if mask.kind == "frame_causal":
        image, action, window = mask.numbers
    else:
        rows, columns, ahead, action, window, context, refresh = mask.numbers
        image = _slots(rows, columns, refresh)
    # As if the stream began with an action block: slot -1 of a frame is its last action token.
    q_frame, k_frame = (_floor_div(x + action, image + action) for x in (q, k))
    q_slot, k_slot = (
        x + action - frame * (image + action) - action for x, frame in ((q, q_frame), (k, k_frame))
    )
    same_image = (q_slot >= 0) & (k_slot >= 0) & (q_frame == k_frame)
    if mask.kind == "frame_causal":
        seen = before | same_image
    else:
        own = same_image & (q_frame >= context)
        q_tau, k_tau = (_tau(slot, rows, columns, ahead, refresh) for slot in (q_slot, k_slot))
        seen = before & ~(own & (k_tau > q_tau))
        if refresh:
            replaced = q_tau - k_tau >= columns - ahead
            seen = seen & ~(_waits(k_slot, rows, columns, refresh) & (replaced | ~own))
    return seen & (k_frame > q_frame - window) if window else seen


def _slots(rows: int, columns: int, refresh: int) -> int:
    """S of a diagonal mask."""
    return rows * (columns + refresh) - refresh


def _waits(slot: Tensor, rows: int, columns: int, refresh: int) -> Tensor:
    """Whether a slot is fed when the next row begins, before its token is drawn."""
    r = _floor_div(slot, columns + refresh)
    return (slot - r * (columns + refresh) == columns - 1) & (r >= 0) & (r < rows - 1)


def _tau(slot: Tensor, rows: int, columns: int, ahead: int, refresh: int) -> Tensor:
    r = _floor_div(slot, columns + refresh)
    c = slot - r * (columns + refresh)
    fed = r * ahead + (c + 1).clamp(max=columns)
    return torch.where(_waits(slot, rows, columns, refresh), (r + 1) * ahead, fed)


def _floor_div(x: Tensor, y: int) -> Tensor:
    return x.div(y, rounding_mode="floor")


def _window(kind: str, name: str, value: int | None) -> int:
    if value is None:
        return 0
    _check(kind, name, value, 1)
    return value


def _check(kind: str, name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value < _LIMIT:
        none = " or None" if least == 1 and name.startswith("window_") else ""
        raise InputError(
            f"{kind}: {name} must be an integer from {least} and below 2^31{none}, got {value!r}"
        )
