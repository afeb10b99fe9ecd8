"""Clips stay in an episode; the cache is made once, made anew when files change, never broken."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from testkit import SIZE, environment, write_recording

from rlir.actions.space import DOOM
from rlir.data import clips as clips_module
from rlir.data.clips import Clips, open_clips, require_disjoint, to_bytes, to_unit
from rlir.data.recording import read_actions, read_video
from rlir.errors import InputError


def of_episodes(lengths: list[int]) -> Clips:
    """Clips of episodes of these lengths, without files."""
    episode = np.repeat(np.arange(len(lengths)), lengths)
    frames = np.zeros((len(episode), 1, 1, 3), np.uint8)
    actions = torch.zeros(len(episode), 4, dtype=torch.int64)
    return Clips(Path("data"), Path("cache"), (), frames, actions, episode)


@pytest.fixture
def data(recorded: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(recorded, tmp_path / "data"))


def test_clips_hold_every_frame_and_action_in_order(clips: Clips) -> None:
    videos = [read_video(r.video, *SIZE) for r in clips.recordings]
    np.testing.assert_array_equal(clips.frames, np.concatenate(videos))
    actions = [read_actions(r.actions, DOOM) for r in clips.recordings]
    np.testing.assert_array_equal(clips.actions.numpy(), np.concatenate(actions))
    np.testing.assert_array_equal(np.bincount(clips.episode), [12, 20, 9])
    assert [clips.map_of(start) for start in (0, 12, 40)] == ["m0", "m1", "m0"]


episodes = st.lists(st.integers(1, 12), min_size=1, max_size=6)


@given(episodes, st.integers(1, 14))
def test_a_clip_stays_in_one_episode(lengths: list[int], length: int) -> None:
    clips = of_episodes(lengths)
    found = clips.starts(length).tolist()
    inside = [
        start
        for start in range(sum(lengths) - length + 1)
        if len(set(clips.episode[start : start + length])) == 1
    ]
    assert found == inside


@given(episodes, st.integers(1, 5), st.integers(0, 1000))
def test_picked_clips_share_no_frame_and_depend_on_the_seed_alone(
    lengths: list[int], length: int, seed: int
) -> None:
    clips = of_episodes([8, *lengths])
    picked = clips.pick(1, length, seed)
    most = 1
    while True:
        try:
            picked = clips.pick(most + 1, length, seed)
        except InputError:
            break
        most += 1
    assert most == sum(n // length for n in [8, *lengths]), "no episode's frames are wasted"
    assert torch.equal(picked, clips.pick(most, length, seed))
    frames = (picked[:, None] + torch.arange(length)).flatten().tolist()
    assert len(set(frames)) == len(frames) == most * length
    assert set(picked.tolist()) <= set(clips.starts(length).tolist())


def test_another_seed_picks_other_clips(clips: Clips) -> None:
    picks = {tuple(clips.pick(4, 4, seed).tolist()) for seed in range(8)}
    assert len(picks) > 1


def test_too_few_clips_are_refused(clips: Clips) -> None:
    with pytest.raises(InputError, match="must hold 99 clips of 5 frames that share none, found"):
        clips.pick(99, 5, 0)


def test_a_clip_is_the_same_rows_of_any_array(clips: Clips) -> None:
    starts = torch.tensor([0, 13])
    frames = clips.clip(clips.frames, starts, 4)
    actions = clips.clip(clips.actions, starts, 4)
    assert frames.shape == (2, 4, *SIZE, 3)
    for i, start in enumerate(starts):
        np.testing.assert_array_equal(frames[i], clips.frames[start : start + 4])
        assert torch.equal(actions[i], clips.actions[start : start + 4])


# -- the cache ---------------------------------------------------------------------------------


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The videos that are decoded inside."""
    decoded: list[str] = []
    real = clips_module.iterate_frames

    def iterate(path: Path, height: int, width: int) -> Iterator[np.ndarray]:
        decoded.append(path.name)
        return real(path, height, width)

    with monkeypatch.context() as patch:
        patch.setattr(clips_module, "iterate_frames", iterate)
        yield decoded


def test_nothing_is_decoded_twice(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with counted(monkeypatch) as decoded:
        first = open_clips(data, DOOM, *SIZE)
        assert len(decoded) == 3
        second = open_clips(data, DOOM, *SIZE)
        assert len(decoded) == 3
    np.testing.assert_array_equal(first.frames, second.frames)


def touch_video(data: Path) -> None:
    os.utime(data / "episode-1.mp4", ns=(1, 1))


def change_actions(data: Path) -> None:
    path = data / "episode-0.jsonl"
    path.write_text(path.read_text().replace('"buttons":[]', '"buttons":[0]'))


def add_episode(data: Path) -> None:
    write_recording(data, "new", 6, seed=9)


def remove_episode(data: Path) -> None:
    for path in data.glob("episode-2.*"):
        path.unlink()


@pytest.mark.parametrize("change", [touch_video, change_actions, add_episode, remove_episode])
def test_a_change_of_the_files_makes_the_cache_anew(
    data: Path, change, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_clips(data, DOOM, *SIZE).derived("x", (), "int64", lambda f: torch.zeros(len(f)))
    change(data)
    with counted(monkeypatch) as decoded:
        found = open_clips(data, DOOM, *SIZE)
    assert decoded == [r.video.name for r in found.recordings]
    actions = [read_actions(r.actions, DOOM) for r in found.recordings]
    np.testing.assert_array_equal(found.actions.numpy(), np.concatenate(actions))
    assert not (found.cache / "x.npy").exists(), "what was derived from the old frames is gone"


def test_each_size_has_a_cache_of_its_own(data: Path) -> None:
    small, large = open_clips(data, DOOM, 16, 48), open_clips(data, DOOM, 32, 96)
    assert small.frames.shape[1:3] == (16, 48)
    assert large.frames.shape[1:3] == (32, 96)
    assert open_clips(data, DOOM, 16, 48).frames.shape == small.frames.shape


@pytest.mark.parametrize("kind", [KeyboardInterrupt, OSError])
def test_an_interrupted_decode_leaves_no_cache(
    data: Path, kind: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(done: int, total: int) -> None:
        if done == 2:
            raise kind

    with pytest.raises(kind):
        open_clips(data, DOOM, *SIZE, stop)
    assert not list(data.glob("*cache*"))
    with counted(monkeypatch) as decoded:
        assert len(open_clips(data, DOOM, *SIZE).frames) == 41
    assert len(decoded) == 3


def test_an_interrupted_decode_leaves_the_good_cache_of_the_old_files(data: Path) -> None:
    before = np.array(open_clips(data, DOOM, *SIZE).frames)
    video = data / "episode-1.mp4"
    good, stat = video.read_bytes(), video.stat()
    video.write_bytes(good[:500])
    with pytest.raises(InputError, match=r"episode-1\.mp4 must be a readable video"):
        open_clips(data, DOOM, *SIZE)
    video.write_bytes(good)
    os.utime(video, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    np.testing.assert_array_equal(open_clips(data, DOOM, *SIZE).frames, before)


def test_a_cache_whose_key_is_broken_is_made_anew(data: Path) -> None:
    before = open_clips(data, DOOM, *SIZE)
    (before.cache / "key.json").write_text("{")
    np.testing.assert_array_equal(open_clips(data, DOOM, *SIZE).frames, before.frames)


def test_two_processes_may_decode_the_same_data(data: Path, tmp_path: Path) -> None:
    """One that comes second finds the other's cache in its place, and keeps it."""
    done = open_clips(data, DOOM, *SIZE).cache
    other = Path(shutil.move(done, tmp_path / "other"))

    def overtake(at: int, total: int) -> None:
        if at == total:
            shutil.copytree(other, done)
            (done / "mark").touch()

    clips = open_clips(data, DOOM, *SIZE, overtake)
    assert len(clips.frames) == 41
    assert (clips.cache / "mark").exists()
    assert [p.name for p in data.glob("*cache*")] == [done.name]


@pytest.fixture
def small_disk(recorded: Path, tmp_path: Path) -> Iterator[Path]:
    """The recordings on a disk that has no room for the 94 kB of their frames."""
    size = sum(path.stat().st_size for path in recorded.iterdir()) + 2**16
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small disk takes rights that this user does not have")
    try:
        yield Path(shutil.copytree(recorded, tmp_path / "data"))
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_full_disk_is_an_error_and_not_the_end_of_the_process(small_disk: Path) -> None:
    """In a process of its own: what writes to a memory map without room is killed (SIGBUS)."""
    program = f"""
from pathlib import Path
from rlir.actions.space import DOOM
from rlir.data.clips import open_clips
open_clips(Path({str(small_disk)!r}), DOOM, *{SIZE})
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "No space left on device" in done.stderr.splitlines()[-1]
    assert not list(small_disk.glob("*cache*"))


# -- derived arrays, sets ----------------------------------------------------------------------


def test_a_derived_array_is_made_once(data: Path) -> None:
    clips, calls = open_clips(data, DOOM, *SIZE), []

    def brightness(frames: torch.Tensor) -> torch.Tensor:
        calls.append(len(frames))
        return frames.float().mean((1, 2, 3))

    found = clips.derived("brightness", (), "float32", brightness, batch=16)
    np.testing.assert_allclose(found, clips.frames.mean((1, 2, 3)), rtol=1e-5)
    assert calls == [16, 16, 9]
    again = open_clips(data, DOOM, *SIZE).derived("brightness", (), "float32", brightness)
    np.testing.assert_array_equal(again, found)
    assert len(calls) == 3


def test_a_derived_array_that_fails_leaves_nothing(data: Path) -> None:
    clips = open_clips(data, DOOM, *SIZE)

    def fail(frames: torch.Tensor) -> torch.Tensor:
        if len(frames) < 16:
            raise KeyboardInterrupt
        return torch.zeros(len(frames))

    before = sorted(clips.cache.iterdir())
    with pytest.raises(KeyboardInterrupt):
        clips.derived("x", (), "float32", fail, batch=16)
    assert sorted(clips.cache.iterdir()) == before


def test_sets_that_share_an_episode_are_refused(tmp_path: Path) -> None:
    sets = {}
    for name, seeds in (("train", (1, 2)), ("test", (3,)), ("other", (2, 4))):
        for seed in seeds:
            write_recording(tmp_path / name, f"e{seed}-{name}", 3, seed)
        sets[name] = open_clips(tmp_path / name, DOOM, *SIZE)
    require_disjoint(train=sets["train"], test=sets["test"])
    with pytest.raises(InputError, match=r"train and other must share no episode, got \('m', 2\)"):
        require_disjoint(**sets)


def test_the_same_seed_on_another_map_is_another_episode(tmp_path: Path) -> None:
    for name in "ab":
        write_recording(tmp_path / name, "e", 3, seed=1, map_name=name)
    require_disjoint(**{name: open_clips(tmp_path / name, DOOM, *SIZE) for name in "ab"})


def test_bytes_to_unit_and_back_is_the_identity() -> None:
    frames = torch.arange(256, dtype=torch.uint8).repeat(3).view(1, 16, 16, 3)
    unit = to_unit(frames)
    assert unit.shape == (1, 3, 16, 16)
    assert (float(unit.min()), float(unit.max())) == (-1, 1)
    assert torch.equal(to_bytes(unit), frames)
