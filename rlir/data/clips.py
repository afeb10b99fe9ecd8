"""Clips out of recordings: frames decoded once into a memory-mapped cache, then indexed."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import DTypeLike
from torch import Tensor

from rlir.actions.space import ActionSpace
from rlir.checkpoints import read_json, write_json
from rlir.data.recording import Recording, find_recordings, iterate_frames, read_actions
from rlir.errors import InputError

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Clips:
    """Frames, actions and derived arrays of one data directory.

    ``frames`` uint8 [N, H, W, 3] memory-mapped; ``actions`` int64 [N, F], action t leads from
    frame t to frame t + 1; ``episode`` int64 [N].
    """

    directory: Path
    cache: Path
    recordings: tuple[Recording, ...]
    frames: np.ndarray
    actions: Tensor
    episode: np.ndarray

    def starts(self, length: int) -> Tensor:
        """Every index at which a clip of ``length`` frames stays in one episode, int64."""
        last = len(self.episode) - length + 1
        if last <= 0:
            return torch.empty(0, dtype=torch.int64)
        same = self.episode[:last] == self.episode[length - 1 :]
        return torch.from_numpy(np.nonzero(same)[0])

    def map_of(self, start: int) -> str:
        return self.recordings[int(self.episode[start])].map

    def pick(self, count: int, length: int, seed: int) -> Tensor:
        """``count`` clip starts, spread over all episodes, that do not share a frame."""
        generator = torch.Generator().manual_seed(seed)
        first, frames = np.unique(self.episode, return_index=True, return_counts=True)[1:]
        rows = []
        for begin, n in zip(first.tolist(), frames.tolist(), strict=True):
            spare = n % length  # what whole clips leave over, put before the first of them
            offset = int(torch.randint(spare + 1, (), generator=generator))
            rows.append(begin + offset + length * torch.arange(n // length))
        starts = torch.cat(rows)
        if len(starts) < count:
            raise InputError(
                f"data: {self.directory} must hold {count} clips of {length} frames that share "
                f"none, found {len(starts)}: record more episodes"
            )
        return starts[torch.randperm(len(starts), generator=generator)[:count]].sort().values

    def clip(self, array: np.ndarray | Tensor, starts: Tensor, length: int) -> Tensor:
        """[B, length, ...] of an array that has one row a frame."""
        index = starts[:, None] + torch.arange(length)
        if isinstance(array, Tensor):
            return array[index]
        return torch.from_numpy(array[index.numpy()])

    def derived(
        self,
        name: str,
        tail: tuple[int, ...],
        dtype: DTypeLike,
        make: Callable[[Tensor], Tensor],
        progress: Progress | None = None,
        batch: int = 128,
    ) -> np.ndarray:
        """An array with one row a frame, made from the frames once and kept in the cache."""
        path = self.cache / f"{name}.npy"
        if not path.exists():
            temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
            shape = (len(self.frames), *tail)
            try:
                out = _new_array(temporary, dtype, shape)
                for i in range(0, len(self.frames), batch):
                    rows = torch.from_numpy(np.array(self.frames[i : i + batch]))
                    out[i : i + batch] = make(rows).numpy()
                    if progress:
                        progress(min(i + batch, len(self.frames)), len(self.frames))
                out.flush()
                os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)
        return np.load(path, mmap_mode="r")


def _new_array(path: Path, dtype: DTypeLike, shape: tuple[int, ...]) -> np.memmap:
    """A memory-mapped file that has its space on the disk.

    Without that a disk that fills up kills the process in the middle of a write (SIGBUS).
    """
    out: np.memmap = np.lib.format.open_memmap(path, "w+", dtype=dtype, shape=shape)
    with path.open("r+b") as file:
        os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return out


def _key(recordings: list[Recording], space: ActionSpace, height: int, width: int) -> str:
    parts: list[object] = [repr(space), height, width]
    for recording in recordings:
        for file in (recording.video, recording.actions):
            stat = file.stat()
            parts.append((file.name, stat.st_size, stat.st_mtime_ns))
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _current(cache: Path, key: str) -> bool:
    """Whether a cache is there and is of these files."""
    try:
        return bool(read_json(cache / "key.json") == key)
    except InputError:
        return False


def open_clips(
    directory: Path,
    space: ActionSpace,
    height: int,
    width: int,
    progress: Progress | None = None,
) -> Clips:
    """Decode a directory of recordings (once; the cache lies beside them) and check it.

    Raises InputError for a missing or truncated mp4, a jsonl of another length, a broken line.
    """
    recordings = find_recordings(directory)
    cache = directory / f"cache-{height}x{width}"
    key = _key(recordings, space, height, width)
    if not _current(cache, key):
        _decode(recordings, cache, key, space, (height, width), progress)
    frames = np.load(cache / "frames.npy", mmap_mode="r")
    actions = torch.from_numpy(np.load(cache / "actions.npy").astype(np.int64))
    episode = np.load(cache / "episode.npy")
    return Clips(directory, cache, tuple(recordings), frames, actions, episode)


def _decode(
    recordings: list[Recording],
    cache: Path,
    key: str,
    space: ActionSpace,
    size: tuple[int, int],
    progress: Progress | None,
) -> None:
    actions = [read_actions(recording.actions, space) for recording in recordings]
    total = sum(len(a) for a in actions)
    temporary = cache.with_name(f".{cache.name}.{os.getpid()}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        shape = (total, *size, 3)
        out = _new_array(temporary / "frames.npy", np.uint8, shape)
        row = 0
        for i, recording in enumerate(recordings):
            count, expected = 0, len(actions[i])
            for frame in iterate_frames(recording.video, *size):
                if count < expected:
                    out[row + count] = frame
                count += 1
            if count != expected:
                raise InputError(
                    f"data: {recording.actions.name} must have a line for each of the {count} "
                    f"frames of {recording.video.name}, got {expected} lines"
                )
            row += count
            if progress:
                progress(i + 1, len(recordings))
        out.flush()
        np.save(temporary / "actions.npy", np.concatenate(actions))
        lengths = [len(a) for a in actions]
        np.save(temporary / "episode.npy", np.repeat(np.arange(len(actions)), lengths))
        write_json(temporary / "key.json", key)
        if not _current(cache, key):  # another process may have been faster
            shutil.rmtree(cache, ignore_errors=True)
            os.replace(temporary, cache)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def require_disjoint(**sets: Clips) -> None:
    """Data sets that must share no episode: an episode is a map and a seed."""
    names = list(sets)
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            shared = {r.key for r in sets[a].recordings} & {r.key for r in sets[b].recordings}
            if shared:
                raise InputError(
                    f"data: {a} and {b} must share no episode, got {sorted(shared)[0]} in both"
                )


def to_unit(frames: Tensor) -> Tensor:
    """uint8 [..., H, W, 3] to float32 [..., 3, H, W] in [-1, 1]."""
    return frames.movedim(-1, -3).float().div_(127.5).sub_(1.0)


def to_bytes(frames: Tensor) -> Tensor:
    """float [..., 3, H, W] in [-1, 1] to uint8 [..., H, W, 3]."""
    return (frames.float().clamp(-1, 1) + 1).mul_(127.5).round_().to(torch.uint8).movedim(-3, -1)
