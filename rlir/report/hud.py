"""The strip under a frame that shows the action asked for and the action seen.

Two lines: what was commanded (amber) and what an inverse dynamics model recovered (green where
it agrees, red where it does not). Keys are caps, camera axes are gauges with degrees. Drawn at
twice the size and averaged down, since Pillow does not smooth the edges of shapes.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from rlir.actions.space import ActionSpace, CameraAxis, KeyGroup

COMMANDED, AGREES, DIFFERS = "#f2b134", "#43c588", "#ff5d5d"
BACKGROUND, INK, DIM, TRACK = "#15171b", "#d9dce1", "#565b65", "#2a2e36"
_SUPERSAMPLE = 2

# All lengths below are in pixels at a frame width of 384 and scale with it.
_REFERENCE_WIDTH = 384
_LINE, _GAP, _MARGIN, _LABEL, _CAP = 22, 4, 8, 48, 20
_LEAST_GAUGE, _DEGREES = 96, 40


@dataclass(frozen=True)
class _Widget:
    """A key (``value`` of its factor's classes) or a camera axis, at x on a pair of lines."""

    factor: int
    value: int  # 0 for an axis
    text: str
    x: float
    width: float
    pair: int


def _caps(space: ActionSpace) -> list[tuple[int, int, str]]:
    """Factor, class and text of every key; W A S D first and in that order."""
    out = []
    for factor, group in enumerate(space.factors):
        if not isinstance(group, KeyGroup):
            continue
        for i, key in enumerate(group.keys):
            text = key.rsplit(".", 1)[-1].upper()
            if key.startswith("mouse."):  # a number says nothing: the group's words do
                words = group.name.upper().split("_")
                text = words[i] if len(words) == len(group.keys) else group.name.upper()
                text = "FIRE" if words == ["ATTACK"] else text
            out.append((factor, i + 1, text))
    return sorted(out, key=lambda cap: "WASD".find(cap[2]) % 9 if len(cap[2]) == 1 else 9)


@cache
def _layout(space: ActionSpace) -> tuple[tuple[_Widget, ...], int]:
    """Widgets from left to right, on as many pairs of lines as they need."""
    end, x, pair, out = _REFERENCE_WIDTH - _MARGIN, float(_LABEL), 0, []
    for factor, value, text in _caps(space):
        width = max(_CAP, 8.0 + 8.8 * len(text))
        if x + width > end:
            x, pair = float(_LABEL), pair + 1
        out.append(_Widget(factor, value, text, x, width, pair))
        x += width + _GAP
    axes = len(space.axes)
    if x + axes * (_LEAST_GAUGE + _GAP) > end:
        x, pair = float(_LABEL), pair + 1
    width = (end - x) / max(axes, 1)
    for factor, axis in enumerate(space.axes):
        name = axis.name if axes > 1 else ""  # the only one needs none
        out.append(_Widget(factor, 0, name, x + 2 * _GAP, width - 2 * _GAP, pair))
        x += width
    return tuple(out), pair + 1


def hud_height(space: ActionSpace, width: int) -> int:
    """Pixels the strip takes under a frame of this width; even, as video wants it."""
    pairs = _layout(space)[1]
    lines = pairs * (2 * _LINE + _GAP) + (pairs + 1) * _MARGIN
    return 2 * round(lines * width / _REFERENCE_WIDTH / 2)


@cache
def font(size: int, bold: bool = True) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which matplotlib brings along."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts/ttf" / name), size)


class _Pen:
    """Draws in reference pixels."""

    def __init__(self, image: Image.Image):
        self.draw = ImageDraw.Draw(image)
        self.scale = image.width / _REFERENCE_WIDTH

    def box(
        self, x: float, y: float, w: float, h: float, *, fill: str | None, line: str | None = None
    ) -> None:
        s = self.scale
        self.draw.rounded_rectangle(
            (x * s, y * s, (x + w) * s - 1, (y + h) * s - 1),
            radius=4 * s,
            fill=fill,
            outline=line,
            width=max(1, round(1.5 * s)),
        )

    def text(self, x: float, y: float, text: str, *, fill: str, size: int, anchor: str) -> None:
        s = self.scale
        self.draw.text((x * s, y * s), text, fill=fill, font=font(round(size * s)), anchor=anchor)

    def dot(self, x: float, y: float, radius: float, fill: str) -> None:
        s = self.scale
        self.draw.circle((x * s, y * s), radius * s, fill=fill)

    def bar(self, x0: float, x1: float, y: float, h: float, fill: str) -> None:
        s, low, high = self.scale, min(x0, x1), max(x0, x1)
        self.draw.rectangle((low * s, (y - h / 2) * s, high * s, (y + h / 2) * s), fill=fill)


def _key(pen: _Pen, widget: _Widget, y: float, *, pressed: bool, missed: bool, colour: str) -> None:
    if pressed:
        pen.box(widget.x, y, widget.width, _LINE, fill=colour)
    else:
        pen.box(widget.x, y, widget.width, _LINE, fill=None, line=colour if missed else TRACK)
    ink = BACKGROUND if pressed else (colour if missed else DIM)
    middle = widget.x + widget.width / 2, y + _LINE / 2
    pen.text(*middle, widget.text, fill=ink, size=12, anchor="mm")


def _gauge(
    pen: _Pen, widget: _Widget, y: float, axis: CameraAxis, value: int, *, colour: str
) -> None:
    """Bins are equally wide, so the scale is mu-law; the bar goes from rest to the value."""
    name = 7.5 * len(widget.text)
    left, track = widget.x + name, widget.width - _DEGREES - name
    middle, centre = y + _LINE / 2, left + track / 2
    tip = left + 6 + (track - 12) * value / (axis.size - 1)
    pen.text(widget.x, middle, widget.text, fill=DIM, size=10, anchor="lm")
    pen.bar(left, left + track, middle, 5, TRACK)
    pen.bar(centre - 0.8, centre + 0.8, middle, 13, DIM)
    pen.bar(centre, tip, middle, 5, colour)
    pen.dot(tip, middle, 5, colour)
    degrees = f"{axis.centres()[value]:+.0f}°" if value != axis.size // 2 else "0°"
    pen.text(widget.x + widget.width, middle, degrees, fill=colour, size=13, anchor="rm")


def draw_hud(
    space: ActionSpace,
    width: int,
    commanded: np.ndarray | None,
    recovered: np.ndarray | None,
) -> np.ndarray:
    """The strip, uint8 [hud_height, width, 3]. Actions int [F]; none are drawn for a prompt."""
    height = hud_height(space, width)
    image = Image.new("RGB", (width * _SUPERSAMPLE, height * _SUPERSAMPLE), BACKGROUND)
    pen = _Pen(image)
    if commanded is None:
        middle = height / 2 * _REFERENCE_WIDTH / width
        pen.text(_REFERENCE_WIDTH / 2, middle, "prompt frame", fill=DIM, size=13, anchor="mm")
    else:
        _draw_lines(pen, space, commanded, recovered)
    return np.asarray(image.resize((width, height), Image.Resampling.BOX))


def _draw_lines(
    pen: _Pen, space: ActionSpace, commanded: np.ndarray, recovered: np.ndarray | None
) -> None:
    widgets, pairs = _layout(space)
    seen = None if recovered is None else recovered.tolist()
    for line, action in enumerate((commanded.tolist(), seen)):
        if action is None:
            continue
        for pair in range(pairs):
            y = _MARGIN + pair * (2 * _LINE + _GAP + _MARGIN) + line * (_LINE + _GAP)
            name = ("asked", "seen")[line]
            pen.text(_MARGIN, y + _LINE / 2, name, fill=INK, size=11, anchor="lm")
            for widget in (w for w in widgets if w.pair == pair):
                value, asked = action[widget.factor], int(commanded[widget.factor])
                colour = COMMANDED if line == 0 else AGREES if value == asked else DIFFERS
                factor = space.factors[widget.factor]
                if isinstance(factor, CameraAxis):
                    _gauge(pen, widget, y, factor, value, colour=colour)
                    continue
                pressed = value == widget.value
                missed = line == 1 and asked == widget.value and not pressed
                _key(pen, widget, y, pressed=pressed, missed=missed, colour=colour)
