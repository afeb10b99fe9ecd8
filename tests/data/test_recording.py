"""What was written is read back, and every bad file is named in one line."""

import ctypes
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from testkit import KEYS, SIZE, examples, line, one_line, picture, write_recording

from rlir.actions.space import DEGREES_PER_PIXEL, DOOM
from rlir.data.clips import open_clips
from rlir.data.recording import (
    find_recordings,
    read_actions,
    read_video,
    write_actions,
    write_video,
)
from rlir.errors import InputError

FRAMES = 20


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((a.astype(float) - b.astype(float)) ** 2)))


def test_frames_are_read_back_nearly_as_they_were(tmp_path: Path) -> None:
    frames = picture(FRAMES, height=64, width=96)
    path = tmp_path / "a.mp4"
    write_video(path, frames, 7.0)
    found = read_video(path, 64, 96)
    assert found.shape == frames.shape
    assert found.dtype == np.uint8
    assert psnr(found, frames) > 25  # edges between saturated colours: chroma is halved
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]


def test_frames_are_averaged_to_size(tmp_path: Path) -> None:
    grey = picture(FRAMES, height=64, width=96)[..., :1].repeat(3, -1)
    write_video(tmp_path / "a.mp4", grey, 7.0)
    mean = grey.reshape(FRAMES, 32, 2, 48, 2, 3).mean((2, 4))
    assert psnr(read_video(tmp_path / "a.mp4", 32, 48), mean) > 40


def test_colour_is_averaged_too(tmp_path: Path) -> None:
    """At half size every pixel has a colour of its own, though the file holds one for four."""
    generator = np.random.default_rng(0)
    blocks = 64 + generator.integers(0, 2, (1, 16, 24, 3), dtype=np.uint8) * 128
    frames = blocks.repeat(4, 1).repeat(4, 2).repeat(6, 0)
    write_video(tmp_path / "a.mp4", frames, 7.0, crf=4)
    mean = frames.reshape(6, 32, 2, 48, 2, 3).mean((2, 4))
    assert psnr(read_video(tmp_path / "a.mp4", 32, 48), mean) > 27  # 24 otherwise


def test_frames_keep_their_order(tmp_path: Path) -> None:
    frames = np.repeat(np.arange(0, 240, 6, dtype=np.uint8), 32 * 48 * 3).reshape(-1, 32, 48, 3)
    write_video(tmp_path / "a.mp4", frames, 7.0)
    found = read_video(tmp_path / "a.mp4", 32, 48).mean((1, 2, 3))
    np.testing.assert_allclose(found, frames[:, 0, 0, 0], atol=2)


def test_the_same_frames_give_the_same_bytes(tmp_path: Path) -> None:
    for name in "ab":
        write_video(tmp_path / f"{name}.mp4", picture(FRAMES), 7.0)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


@contextmanager
def memory_full_of(value: int) -> Iterator[None]:
    """Malloc hands out memory full of ``value``: what is read before it is written is known.

    Only glibc can be asked for it (and keeps small pieces as they are); elsewhere nothing happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda *_: 1)
    perturb = -6  # M_PERTURB of malloc.h
    # New memory gets the complement of the low byte; a bit above it, for 0 would turn it off.
    assert mallopt(perturb, 0x100 | (value ^ 0xFF))
    try:
        yield
    finally:
        mallopt(perturb, 0)


@pytest.mark.parametrize(("height", "width"), [(32, 96), (40, 104), (128, 192)])
def test_the_bytes_do_not_depend_on_what_memory_held(
    tmp_path: Path, height: int, width: int
) -> None:
    """An encoder that reads past its arrays gives other bytes once in hundreds; here, each time.

    No width is a multiple of 128: x264 with AVX-512 takes eight blocks of 16 pixels at a time.
    """
    frames = picture(FRAMES, height=height, width=width)
    written = set()
    for value in (0x00, 0x55, 0xAA, 0xFE):
        with memory_full_of(value):
            write_video(tmp_path / "a.mp4", frames, 7.0)
        written.add((tmp_path / "a.mp4").read_bytes())
    assert len(written) == 1


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    steps=st.lists(
        st.tuples(st.sets(st.sampled_from(KEYS)), st.integers(-300, 300), st.booleans()),
        min_size=1,
        max_size=30,
    )
)
def test_actions_are_read_back_exactly(
    tmp_path: Path, steps: list[tuple[set[str], int, bool]]
) -> None:
    path = tmp_path / "a.jsonl"
    write_actions(path, [line(sorted(keys), dx, [0] if fire else []) for keys, dx, fire in steps])
    found = read_actions(path, DOOM)
    assert found.shape == (len(steps), 4)
    for row, (keys, dx, fire) in zip(found, steps, strict=True):
        held = [f"key.keyboard.{k}" in keys for k in "wsad"]
        assert row[0] == DOOM.axes[0].encode(np.array(dx * DEGREES_PER_PIXEL))
        assert row[1] == (0 if held[0] == held[1] else 1 if held[0] else 2)
        assert row[2] == (0 if held[2] == held[3] else 1 if held[2] else 2)
        assert row[3] == fire


def test_recordings_are_found_by_name_with_their_origin(tmp_path: Path) -> None:
    write_recording(tmp_path, "b", seed=7, map_name="MAP02")
    write_recording(tmp_path, "a", seed=5, map_name="MAP01")
    (tmp_path / "left-over.mp4").touch()  # an episode that was not finished: no jsonl yet
    found = find_recordings(tmp_path)
    assert [r.video.name for r in found] == ["a.mp4", "b.mp4"]
    assert [r.key for r in found] == [("MAP01", 5), ("MAP02", 7)]


def test_recordings_of_other_origin_are_told_apart_by_name(tmp_path: Path) -> None:
    for name in "ab":
        write_video(tmp_path / f"{name}.mp4", picture(2), 7.0)
        write_actions(tmp_path / f"{name}.jsonl", [line(), line()])
    first, second = find_recordings(tmp_path)
    assert first.key != second.key


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    video, actions = write_recording(tmp_path)
    before = video.read_bytes(), actions.read_bytes()

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="No space"):
        write_video(video, picture(3), 7.0)
    with pytest.raises(OSError, match="No space"):
        write_actions(actions, [line()])
    assert (video.read_bytes(), actions.read_bytes()) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl", "a.mp4"]


# -- bad input ---------------------------------------------------------------------------------


def replace_line(number: int, text: str) -> Callable[[Path, Path], None]:
    def spoil(video: Path, actions: Path) -> None:
        lines = actions.read_text().splitlines()
        lines[number - 1] = text
        actions.write_text("\n".join(lines) + "\n")

    return spoil


def without(*path: str) -> Callable[[Path, Path], None]:
    def spoil(video: Path, actions: Path) -> None:
        whole = line()
        part = whole[path[0]] if len(path) > 1 else whole
        del part[path[-1]]
        replace_line(4, json.dumps(whole))(video, actions)

    return spoil


def cut(share: float) -> Callable[[Path, Path], None]:
    def spoil(video: Path, actions: Path) -> None:
        data = video.read_bytes()
        video.write_bytes(data[: int(len(data) * share)])

    return spoil


def cut_behind_the_header(video: Path, actions: Path) -> None:
    """The index stands first and is whole; frames at the end are missing."""
    moved = video.with_name("moved.mp4")
    with (
        av.open(str(video)) as source,
        av.open(str(moved), "w", options={"movflags": "faststart"}) as target,
    ):
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    data = moved.read_bytes()
    moved.unlink()
    assert data.index(b"moov") < data.index(b"mdat")
    video.write_bytes(data[: -len(data) // 3])


def more_lines(video: Path, actions: Path) -> None:
    actions.write_text(actions.read_text() + json.dumps(line()) + "\n")


def fewer_lines(video: Path, actions: Path) -> None:
    actions.write_text("\n".join(actions.read_text().splitlines()[:-3]) + "\n")


SPOILED = {
    "no video": (lambda v, _: v.unlink(), "a.jsonl must have a.mp4 beside it"),
    "empty video": (cut(0), "a.mp4 must be a readable video"),
    "half a video": (cut(0.5), "a.mp4 must be a readable video"),
    "nearly a video": (cut(0.9), "a.mp4 must be a readable video"),
    "a header with frames missing": (cut_behind_the_header, "a.mp4"),
    "text for a video": (lambda v, _: v.write_text("no"), "a.mp4 must be a readable video"),
    "more lines": (more_lines, "a.jsonl must have a line for each of the 20 frames of a.mp4"),
    "fewer lines": (fewer_lines, "a line for each of the 20 frames of a.mp4, got 17 lines"),
    "no lines": (lambda _, a: a.write_text(""), "a.jsonl line 1 must be a JSON object"),
    "broken first line": (replace_line(1, "{"), "a.jsonl line 1 must be a JSON object"),
    "broken line": (replace_line(7, '{"keyboard'), "a.jsonl line 7 must be a JSON object"),
    "blank line": (replace_line(20, ""), "a.jsonl line 20 must be a JSON object"),
    "a list": (replace_line(3, "[1]"), "a.jsonl line 3 must be a JSON object"),
    "bytes": (lambda _, a: a.write_bytes(b"\xff\xfe\x00"), "a.jsonl line 1 must be a JSON"),
    "no keyboard": (without("keyboard"), "a.jsonl line 4 must hold keyboard.keys"),
    "no keys": (without("keyboard", "keys"), "a.jsonl line 4 must hold keyboard.keys"),
    "no dx": (without("mouse", "dx"), "a.jsonl line 4 must hold keyboard.keys"),
    "no buttons": (without("mouse", "buttons"), "a.jsonl line 4 must hold keyboard.keys"),
    "dx in words": (replace_line(5, json.dumps(line(dx="left"))), "a.jsonl line 5"),
    "dx not a number": (replace_line(5, json.dumps(line(dx=float("nan")))), "a.jsonl line 5"),
    "dx infinite": (replace_line(5, json.dumps(line(dx=float("inf")))), "a.jsonl line 5"),
    "dx too long": (replace_line(5, json.dumps(line(dx=10**400))), "a.jsonl line 5"),
    "seed in words": (replace_line(1, json.dumps(line(seed="x"))), "a.jsonl line 1"),
    "no seed's number": (replace_line(1, json.dumps(line(seed=None))), "a.jsonl line 1"),
}


@pytest.mark.parametrize("case", SPOILED)
def test_a_bad_recording_is_named_in_one_line(tmp_path: Path, case: str) -> None:
    spoil, expected = SPOILED[case]
    spoil(*write_recording(tmp_path, frames=FRAMES))
    with pytest.raises(InputError) as caught:
        open_clips(tmp_path, DOOM, *SIZE)
    assert expected in one_line(str(caught.value))
    assert not list(tmp_path.glob("*cache*")), "no cache of a bad recording"


@pytest.mark.parametrize("kind", ["missing", "file", "empty"])
def test_a_folder_without_recordings_is_named(tmp_path: Path, kind: str) -> None:
    directory = tmp_path / "data"
    if kind == "file":
        directory.touch()
    elif kind == "empty":
        directory.mkdir()
    with pytest.raises(InputError) as caught:
        open_clips(directory, DOOM, *SIZE)
    assert str(directory) in one_line(str(caught.value))


def test_no_line_at_all_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").touch()
    with pytest.raises(InputError, match=r"a\.jsonl must have a line for every frame"):
        read_actions(tmp_path / "a.jsonl", DOOM)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=examples(150))
@given(
    changes=st.lists(
        st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=6
    )
)
def test_a_video_with_other_bytes_is_read_or_named(
    spoiled: tuple[Path, bytes], changes: list[tuple[float, int]]
) -> None:
    path, data = spoiled
    raw = bytearray(data)
    for where, value in changes:
        raw[int(where * len(raw))] = value
    path.write_bytes(raw)
    shape, text = None, ""
    try:
        shape = read_video(path, *SIZE).shape
    except InputError as error:
        text = str(error)
    if shape is None:
        assert path.name in one_line(text)
    else:
        assert shape[1:] == (*SIZE, 3)


@pytest.fixture
def spoiled(tmp_path: Path) -> tuple[Path, bytes]:
    path = tmp_path / "a.mp4"
    write_video(path, picture(4), 7.0)
    return path, path.read_bytes()
