"""Real VizDoom: the same seed gives the same bytes, and what is recorded is what was done."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from testkit import one_line

from rlir.actions.space import DEGREES_PER_PIXEL, DOOM
from rlir.data.clips import open_clips
from rlir.data.doom import TRAIN_MAPS, UNSEEN_MAPS, VIDEO_SIZE, episode_seed, record
from rlir.data.recording import find_recordings, read_actions, read_video
from rlir.errors import InputError

FRAMES = 40
MAPS = ("freedoom1:E1M6", "freedoom2:MAP04")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("played")
    assert record(out, 3, seed=5, maps=MAPS, frames=FRAMES, workers=1) == 3 * FRAMES
    return out


def contents(directory: Path) -> dict[str, bytes]:
    """Bytes of every file, temporary ones too; the decoded cache is another test's."""
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


def lines_of(path: Path) -> list[dict]:
    return [json.loads(text) for text in path.read_text().splitlines()]


def test_the_same_seed_gives_the_same_bytes_with_any_number_of_workers(
    played: Path, tmp_path: Path
) -> None:
    record(tmp_path, 3, seed=5, maps=MAPS, frames=FRAMES, workers=3)
    assert contents(tmp_path) == contents(played)


def test_another_seed_plays_another_way(played: Path, tmp_path: Path) -> None:
    record(tmp_path, 1, seed=6, maps=MAPS, frames=FRAMES)
    (ours,) = tmp_path.glob("*.jsonl")
    theirs = min(played.glob("*.jsonl"))
    assert read_actions(ours, DOOM).tolist() != read_actions(theirs, DOOM).tolist()


def test_episodes_of_a_session_differ_and_take_turns_on_the_maps(played: Path) -> None:
    found = find_recordings(played)
    assert sorted(r.episode for r in found) == [0, 1, 2]
    assert [r.map for r in sorted(found, key=lambda r: r.episode)] == [*MAPS, MAPS[0]]
    assert len({r.seed for r in found}) == 3
    assert len({read_actions(r.actions, DOOM).tobytes() for r in found}) == 3


def test_there_is_a_line_for_every_frame(played: Path) -> None:
    for recording in find_recordings(played):
        assert len(lines_of(recording.actions)) == FRAMES
        assert read_video(recording.video, *VIDEO_SIZE).shape == (FRAMES, *VIDEO_SIZE, 3)
    assert len(open_clips(played, DOOM, 64, 96).frames) == 3 * FRAMES


def test_the_recorded_pixels_are_how_far_the_camera_turned(played: Path) -> None:
    """Doom's angles grow to the left; two decimals of yaw are kept."""
    turned = []
    for recording in find_recordings(played):
        lines = lines_of(recording.actions)
        yaw = np.array([entry["yaw"] for entry in lines])
        asked = np.array([entry["mouse"]["dx"] for entry in lines]) * DEGREES_PER_PIXEL
        change = (np.diff(yaw) + 180) % 360 - 180
        np.testing.assert_allclose(change, -asked[:-1], atol=0.05)
        turned.extend(asked[:-1])
    assert min(turned) < -5
    assert max(turned) > 5


def test_forward_and_back_move_along_the_view(played: Path) -> None:
    """Among steps that moved, forward went ahead and back went back."""
    found = []
    for recording in find_recordings(played):
        lines, actions = lines_of(recording.actions), read_actions(recording.actions, DOOM)
        place = np.array([[entry["xpos"], entry["ypos"]] for entry in lines])
        angle = np.deg2rad([entry["yaw"] for entry in lines])
        ahead = np.stack([np.cos(angle), np.sin(angle)], -1)[:-1]
        along = (np.diff(place, axis=0) * ahead).sum(-1)
        alone = (actions[1:-1, 1] == actions[:-2, 1]) & (actions[1:-1, 1] > 0)  # up to speed
        for held, moved in zip(actions[1:-1, 1][alone], along[1:][alone], strict=True):
            if abs(moved) > 20:
                found.append((held == 1) == (moved > 0))
    assert len(found) > 10
    assert np.mean(found) > 0.9


def test_the_picture_moves_with_the_actions(played: Path) -> None:
    """A step that turns far changes more of the picture than one at rest."""
    far, rest = [], []
    for recording in find_recordings(played):
        frames = read_video(recording.video, 32, 48).astype(float)
        change = np.abs(np.diff(frames, axis=0)).mean((1, 2, 3))
        dx = np.array([entry["mouse"]["dx"] for entry in lines_of(recording.actions)])[:-1]
        far.extend(change[np.abs(dx) > 80])
        rest.extend(change[dx == 0])
    assert far
    assert rest
    assert np.mean(far) > np.mean(rest)


def test_kept_episodes_are_not_played_again(played: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(played, tmp_path / "out"))
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir() if path.is_file()}
    first = min(out.glob("*.jsonl"))
    first.unlink()  # an episode counts when its jsonl is there
    seen: list[tuple[int, int]] = []
    written = record(out, 3, 5, MAPS, FRAMES, progress=lambda *at: seen.append(at))
    assert written == FRAMES
    assert seen == [(3, 3)]
    assert contents(out) == contents(played)
    made = {name for name, time in before.items() if (out / name).stat().st_mtime_ns != time}
    assert made == {first.name, first.with_suffix(".mp4").name}
    assert record(out, 3, 5, MAPS, FRAMES) == 0


@pytest.mark.parametrize("name", ["freedoom1:E9M9", "freedoom2:E1M1", "E1M1", "quake:start", ""])
def test_an_unknown_map_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError) as caught:
        record(tmp_path, 1, seed=0, maps=(name,), frames=4)
    assert repr(name) in one_line(str(caught.value))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "wrong",
    [{"episodes": 0}, {"frames": 1}, {"workers": 0}, {"seed": -1}, {"maps": ()}, {"frames": -5}],
)
def test_arguments_without_sense_are_refused(tmp_path: Path, wrong: dict) -> None:
    with pytest.raises(InputError, match="record: "):
        record(tmp_path / "out", **{"episodes": 1, "seed": 0, "frames": 4, **wrong})
    assert not (tmp_path / "out").exists()


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    with pytest.raises(InputError, match="must be a folder"):
        record(tmp_path / "out", 1, seed=0, frames=4)


def test_seeds_of_episodes_are_all_different() -> None:
    seeds = {episode_seed(seed, episode) for seed in range(20) for episode in range(300)}
    assert len(seeds) == 6000
    assert all(0 <= seed < 2**31 for seed in seeds)


def test_no_map_is_for_training_and_for_testing_alone() -> None:
    assert not set(TRAIN_MAPS) & set(UNSEEN_MAPS)
