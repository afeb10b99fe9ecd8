"""Recordings on disk, in the layout of VPT's contractor data: NAME.mp4 beside NAME.jsonl.

Line t of the jsonl is the action taken while frame t was shown, which led to frame t + 1: keys
held, mouse buttons held, mouse movement in pixels (2400 pixels are a full turn).
"""

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

from rlir.actions.space import DEGREES_PER_PIXEL, ActionSpace
from rlir.errors import InputError


@dataclass(frozen=True)
class Recording:
    """One episode: its two files and what the first line of the jsonl says of it."""

    video: Path
    actions: Path
    map: str
    episode: int
    seed: int

    @property
    def key(self) -> tuple[str, int]:
        """What makes an episode itself; two data sets that share a key share an episode.

        Recordings of other origin say nothing of map and seed: those go by their name.
        """
        return (self.map, self.seed) if self.map else (self.video.stem, 0)


def find_recordings(directory: Path) -> list[Recording]:
    """Every recording of a directory, by name."""
    if not directory.is_dir():
        raise InputError(f"data: a directory of recordings must exist, got {directory}")
    found = []
    for lines in sorted(directory.glob("*.jsonl")):
        video = lines.with_suffix(".mp4")
        if not video.exists():
            raise InputError(f"data: {lines.name} must have {video.name} beside it, found none")
        first = _parse_line(lines, 1, _first_line(lines))
        try:
            episode, seed = int(first.get("episode", 0)), int(first.get("seed", 0))
        except (TypeError, ValueError, OverflowError) as error:
            raise InputError(
                f"data: {lines.name} line 1 must hold whole numbers episode and seed, got {error}"
            ) from None
        found.append(Recording(video, lines, str(first.get("map", "")), episode, seed))
    if not found:
        raise InputError(f"data: {directory} must hold NAME.mp4 and NAME.jsonl pairs, found none")
    return found


def _first_line(path: Path) -> str:
    with path.open(encoding="utf-8", errors="replace") as file:
        return file.readline()


def _parse_line(path: Path, number: int, text: str) -> dict[str, Any]:
    try:
        line = json.loads(text)
        if not isinstance(line, dict):
            raise ValueError("not an object")
        return line
    except ValueError as error:
        raise InputError(
            f"data: {path.name} line {number} must be a JSON object, got {text[:40]!r} ({error})"
        ) from None


def read_actions(path: Path, space: ActionSpace) -> np.ndarray:
    """Classes of every line of a jsonl, uint8 [frames, factors]."""
    rows: list[list[int]] = []
    mouse: dict[str, list[float]] = {"dx": [], "dy": []}
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, text in enumerate(file, 1):
            line = _parse_line(path, number, text)
            try:
                pressed = set(line["keyboard"]["keys"])
                pressed |= {f"mouse.{button}" for button in line["mouse"]["buttons"]}
                for axis, moved in mouse.items():
                    moved.append(float(line["mouse"][axis]))
                    if not math.isfinite(moved[-1]):
                        raise ValueError(f"{axis} is {moved[-1]}")
            except (KeyError, TypeError, ValueError, OverflowError) as error:
                raise InputError(
                    f"data: {path.name} line {number} must hold keyboard.keys and "
                    f"mouse.dx/dy/buttons, got {text[:60]!r} ({error!r})"
                ) from None
            rows.append([group.encode(pressed) for group in space.groups])
    if not rows:
        raise InputError(f"data: {path.name} must have a line for every frame, found none")
    axes = [
        axis.encode(np.array(mouse[axis.source]) * DEGREES_PER_PIXEL)[:, None]
        for axis in space.axes
    ]
    return np.concatenate([*axes, np.array(rows, np.int64)], axis=1).astype(np.uint8)


def iterate_frames(path: Path, height: int, width: int) -> Iterator[np.ndarray]:
    """Frames of a video, uint8 [height, width, 3] RGB, area-averaged to size.

    Converted to RGB at the video's own size first: a scaler that does both keeps one colour sample
    for four pixels of the smaller picture (about 4 dB worse on coloured edges).
    """
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            for frame in container.decode(stream):
                picture = frame.to_ndarray(format="rgb24")
                if picture.shape[:2] != (height, width):
                    image = Image.fromarray(picture).resize((width, height), Image.Resampling.BOX)
                    picture = np.asarray(image)
                yield picture
    except (av.FFmpegError, IndexError, OSError, ValueError) as error:
        raise InputError(f"data: {path.name} must be a readable video, got {error}") from None


def read_video(path: Path, height: int, width: int) -> np.ndarray:
    """All frames, uint8 [frames, height, width, 3] RGB."""
    frames = list(iterate_frames(path, height, width))
    if not frames:
        raise InputError(f"data: {path.name} must be a readable video, got no frame")
    return np.stack(frames)


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """Yields a temporary name beside ``path``; what was written there then takes its place."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_video(path: Path, frames: np.ndarray, fps: float, crf: int = 16) -> None:
    """Write uint8 [frames, height, width, 3] as H.264, under a temporary name first."""
    t, height, width, _ = frames.shape
    with _whole(path) as temporary, av.open(str(temporary), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        # The same frames give the same bytes: one thread, no wall-clock in the stream, and x264's
        # portable macroblock tree. The one for AVX-512 takes eight blocks of a row at a time; where
        # a row is no multiple of 128 pixels it reads on past the last row's end, and what the heap
        # held there steers the rate control.
        stream.options = {
            "crf": str(crf),
            "preset": "veryfast",
            "threads": "1",
            "g": "30",
            "x264-params": "cpu-independent=1",
        }
        for i in range(t):
            for packet in stream.encode(av.VideoFrame.from_ndarray(frames[i], format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


def write_actions(path: Path, lines: list[dict[str, Any]]) -> None:
    """Write a jsonl, under a temporary name first."""
    with _whole(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for line in lines:
            file.write(json.dumps(line, separators=(",", ":")) + "\n")
