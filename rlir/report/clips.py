"""Clips for people: frames magnified, with the action asked for and the action seen beneath."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw

from rlir.actions.space import ActionSpace
from rlir.errors import InputError
from rlir.report.hud import AGREES, BACKGROUND, COMMANDED, DIFFERS, DIM, INK, draw_hud, font


@dataclass(frozen=True, eq=False)
class View:
    """One video of a clip: real, of the base, of the post-trained model."""

    label: str
    frames: np.ndarray
    """uint8 [L, H, W, 3], the prompt first."""
    recovered: np.ndarray
    """What an inverse dynamics model read off them, int64 [T, F] with T = L - 1."""


@dataclass(frozen=True, eq=False)
class ClipPanel:
    """A clip's views side by side, under the same commands."""

    title: str
    space: ActionSpace
    commanded: np.ndarray
    """int64 [T, F]."""
    views: tuple[View, ...]

    def followed(self, view: View) -> tuple[int, int]:
        """Factors that were recovered as commanded, and how many there are."""
        return int((view.recovered == self.commanded).sum()), self.commanded.size


def draw_clip(
    frames: np.ndarray,
    commanded: np.ndarray,
    recovered: np.ndarray | None,
    space: ActionSpace,
    scale: int = 4,
) -> np.ndarray:
    """Frames ``scale`` times as large, with the strip of the action that led to each beneath.

    frames: uint8 [L, H, W, 3]; commanded, recovered: int [L - 1, F]. Returns uint8
    [L, scale H + strip, scale W, 3]; pixels are repeated, so that they are seen as they are.
    """
    length, _, width, _ = frames.shape
    for name, actions in (("commanded", commanded), ("recovered", recovered)):
        if actions is not None and actions.shape != (length - 1, len(space.factors)):
            raise InputError(
                f"clip: {name} must be [{length - 1}, {len(space.factors)}] for {length} frames, "
                f"got {actions.shape}"
            )
    large = frames.repeat(scale, 1).repeat(scale, 2)
    strips = [draw_hud(space, scale * width, None, None)]
    for t in range(length - 1):
        read = None if recovered is None else recovered[t]
        strips.append(draw_hud(space, scale * width, commanded[t], read))
    return np.concatenate([large, np.stack(strips)], axis=1)


def write_clip_mp4(path: Path, frames: np.ndarray, fps: float = 2.0, crf: int = 20) -> None:
    """Write uint8 [L, H, W, 3] as H.264 that browsers play at once (yuv420p, index in front).

    Odd sizes get a last row or column twice. The same frames give the same bytes.
    """
    frames = np.pad(
        frames, ((0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)), "edge"
    )
    temporary = path.with_name(f".{path.name}.partial")
    options = {"movflags": "+faststart"}
    with av.open(str(temporary), "w", format="mp4", options=options) as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000))
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        # Every frame is a keyframe: the report's slider steps through them.
        stream.options = {"crf": str(crf), "preset": "slow", "threads": "1", "g": "1"}
        for frame in frames:
            for packet in stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    os.replace(temporary, path)


def contact_sheet(panels: Sequence[ClipPanel], scale: int = 3) -> Image.Image:
    """All frames of some clips on one picture: a row a view, a column a frame."""
    if not panels:
        raise InputError("contact sheet: there must be a clip, got none")
    margin, gap, title = 8 * scale, 2 * scale, 13 * scale
    labels = [font(4 * scale).getlength(view.label) for panel in panels for view in panel.views]
    side = 2 * margin + round(max(labels))
    drawn = [
        [draw_clip(v.frames, p.commanded, v.recovered, p.space, scale) for v in p.views]
        for p in panels
    ]
    length, height, width, _ = drawn[0][0].shape
    rows = sum(title + len(views) * (height + gap) for views in drawn)
    size = (side + length * (width + gap) + margin, rows + 2 * title)
    sheet = Image.new("RGB", size, BACKGROUND)
    pen, y = ImageDraw.Draw(sheet), gap
    _legend(pen, side, y + title / 2, scale)
    y += title
    for panel, views in zip(panels, drawn, strict=True):
        pen.text((side, y + title / 2), panel.title, fill=INK, font=font(5 * scale), anchor="lm")
        y += title
        for view, frames in zip(panel.views, views, strict=True):
            right, total = panel.followed(view)
            middle = y + height / 2
            small = font(4 * scale, bold=False)
            pen.text((margin, middle), view.label, fill=INK, font=font(4 * scale), anchor="ls")
            pen.text(
                (margin, middle + 3 * scale), f"{right} / {total}", fill=DIM, font=small,
                anchor="lt",
            )  # fmt: skip
            for t, frame in enumerate(frames):
                sheet.paste(Image.fromarray(frame), (side + t * (width + gap), y))
            y += height + gap
    return sheet


def _legend(pen: ImageDraw.ImageDraw, x: float, y: float, scale: int) -> None:
    small = font(4 * scale, bold=False)
    for colour, filled, text in (
        (COMMANDED, True, "asked for"),
        (AGREES, True, "seen as asked"),
        (DIFFERS, True, "seen, not asked for"),
        (DIFFERS, False, "asked for, not seen"),
    ):
        box = (x, y - 2 * scale, x + 4 * scale, y + 2 * scale)
        fill = colour if filled else None
        pen.rounded_rectangle(box, scale, fill=fill, outline=colour, width=scale // 2)
        pen.text((x + 6 * scale, y), text, fill=INK, font=small, anchor="lm")
        x += 14 * scale + pen.textlength(text, small)
