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
    """The arguments of that function, in order; a window of None is 0."""

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
            if window > columns:
                raise InputError(f"diagonal: window must be <= columns, got {window} > {columns}")
            if rows * columns >= _LIMIT:
                raise InputError(
                    f"diagonal: rows x columns must be below 2^31, got {rows} x {columns}"
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
) -> Mask:
    """What a token saw when it was drawn by diagonal decoding (arXiv 2503.14070).

    Row r + 1 of an image begins once row r has ``window`` tokens, w, and every row under way
    advances by one token a step. Slot (r, c) is fed to the model at step tau = r w + c + 1. The
    last column is another matter: row r + 1 begins by feeding row r's last slot, at (r + 1) w, with
    a filler in place of the token that is not drawn yet; only the image's last slot is fed with its
    own token, when the next action block is. A query sees a key of its image if that is not after
    it in raster order and not fed later, tau(key) <= tau(query), and all that is before its image.

    Args:
        rows, columns: of an image; S is their product.
        window: w, from 1 to ``columns``; ``columns`` is raster order, one token after the other.
        action_tokens: A, tokens before every image but the first.
        window_frames: how many frames are seen, the query's own with its actions among them.
        context_frames: the first frames, which were not drawn but given: causal.
    """
    frames = _window("diagonal", "window_frames", window_frames)
    return Mask("diagonal", (rows, columns, window, action_tokens, frames, context_frames))


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
        rows, columns, ahead, action, window, context = mask.numbers
        image = rows * columns
    # As if the stream began with an action block: slot -1 of a frame is its last action token.
    q_frame, k_frame = (_floor_div(x + action, image + action) for x in (q, k))
    q_slot, k_slot = (
        x + action - frame * (image + action) - action for x, frame in ((q, q_frame), (k, k_frame))
    )
    same_image = (q_slot >= 0) & (k_slot >= 0) & (q_frame == k_frame)
    if mask.kind == "frame_causal":
        seen = before | same_image
    else:
        fed_later = _tau(k_slot, rows, columns, ahead) > _tau(q_slot, rows, columns, ahead)
        seen = before & ~(same_image & (q_frame >= context) & fed_later)
    return seen & (k_frame > q_frame - window) if window else seen


def _tau(slot: Tensor, rows: int, columns: int, ahead: int) -> Tensor:
    r = _floor_div(slot, columns)
    c = slot - r * columns
    waits = (c == columns - 1) & (r < rows - 1)
    return torch.where(waits, (r + 1) * ahead, r * ahead + c + 1)


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
