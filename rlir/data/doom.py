"""Record VizDoom (Freedoom content) played by a scripted, persistent, human-like policy.

The policy keeps keys down for a while, turns in smooth sweeps, walks towards open space as the
depth buffer shows it, opens doors and frees itself when it is stuck. No monsters: what changes in
a frame is what the player does, so the action can be read back off the video.
"""

import re
import struct
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from PIL import Image

from rlir.actions.space import DEGREES_PER_PIXEL
from rlir.data.recording import write_actions, write_video
from rlir.errors import InputError

TICS_PER_STEP = 5  # of 35 a second: 7 frames a second; walking is plain to see
FPS = 35 / TICS_PER_STEP
VIDEO_SIZE = (128, 192)  # twice what the tiny models see: chroma survives yuv420p

# Well-lit maps of Freedoom; UNSEEN_MAPS are for testing alone.
TRAIN_MAPS = ("freedoom1:E2M3", "freedoom1:E2M6", "freedoom1:E4M2")
UNSEEN_MAPS = ("freedoom1:E1M4", "freedoom2:MAP09")


LEVEL = re.compile(r"E\dM\d|MAP\d\d")

Job = tuple[str, int, int, int, Path]  # map, episode, its seed, frames, folder


@dataclass
class Play:
    """What the policy does in one step."""

    forward_back: int = 1  # 0 none, 1 forward, 2 back
    left_right: int = 0  # 0 none, 1 left, 2 right
    attack: int = 0
    use: int = 0
    turn: float = 0.0  # degrees, positive to the right


@dataclass
class Policy:
    """A persistent random player. All draws come from ``rng``."""

    rng: np.random.Generator
    play: Play = field(default_factory=Play)
    target: float = 0.0  # the turn speed that it approaches
    freeing: int = 0  # steps left of turning out of a corner
    stuck: int = 0

    def step(self, openness: np.ndarray, moved: float) -> Play:
        """openness [5]: how far one sees, left to right, in [0, 1]; moved: map units."""
        rng, play = self.rng, self.play
        walking = play.forward_back or play.left_right
        self.stuck = self.stuck + 1 if walking and moved < 8 else 0
        if rng.random() < 0.14:
            play.forward_back = int(rng.choice(3, p=[0.25, 0.57, 0.18]))
        if rng.random() < 0.18:
            play.left_right = int(rng.choice(3, p=[0.56, 0.22, 0.22]))
        if rng.random() < 0.25:
            play.attack = int(rng.random() < 0.35)
        if rng.random() < 0.22:
            away = 0.0 if rng.random() < 0.3 else float(np.exp(rng.normal(1.6, 0.7)))
            side = float(openness[3:].sum() - openness[:2].sum())
            right = rng.random() < 1 / (1 + np.exp(-4 * side))
            self.target = away if right else -away
        blocked = self.stuck >= 2 or openness[2] < 0.06
        if blocked and self.freeing == 0 and rng.random() < 0.6:
            self.freeing = int(rng.integers(3, 8))
            right = openness[3:].sum() > openness[:2].sum()
            self.target = float(rng.uniform(8, 18)) * (1 if right else -1)
            play.forward_back = int(rng.choice(3, p=[0.35, 0.35, 0.3]))
        self.freeing = max(0, self.freeing - 1)
        play.use = int(self.stuck == 1 or (blocked and rng.random() < 0.3))
        turn = 0.35 * play.turn + 0.65 * self.target
        play.turn = float(np.clip(turn if abs(turn) >= 0.7 else 0.0, -20, 20))
        return play


def _line(
    play: Play, episode: dict[str, Any], position: tuple[float, float, float], tick: int
) -> dict[str, Any]:
    names = ((play.forward_back, ("w", "s")), (play.left_right, ("a", "d")), (play.use, ("space",)))
    keys = [f"key.keyboard.{choice[held - 1]}" for held, choice in names if held]
    dx = round(play.turn / DEGREES_PER_PIXEL)
    return {
        "keyboard": {"keys": keys},
        "mouse": {"dx": dx, "dy": 0, "buttons": [0] if play.attack else []},
        **episode,
        "tick": tick,
        "xpos": round(position[0], 2),
        "ypos": round(position[1], 2),
        "yaw": round(position[2], 2),
    }


def _lumps(wad: Path) -> set[str]:
    """Every name in a WAD's directory; a level's is among them."""
    with wad.open("rb") as file:
        count, offset = struct.unpack("<4xii", file.read(12))
        file.seek(offset)
        names = (entry[8:] for (entry,) in struct.iter_unpack("16s", file.read(16 * count)))
        return {name.rstrip(b"\0").decode("ascii", "replace") for name in names}


def _make_game(map_name: str, seed: int) -> Any:
    try:
        import vizdoom
    except ImportError as error:
        raise InputError(
            f"record doom: the package vizdoom must import, got {error}; pip install vizdoom"
        ) from None
    content, _, level = map_name.partition(":")
    config = Path(vizdoom.scenarios_path) / f"{content}.cfg"
    wad = Path(vizdoom.__file__).with_name(f"{content}.wad")
    if not LEVEL.fullmatch(level) or not config.exists() or not wad.exists():
        raise InputError(
            f"record doom: a map must read freedoom1:E1M5 or freedoom2:MAP04, got {map_name!r}"
        )
    if level not in _lumps(wad):  # the game would wait for it for ever
        raise InputError(f"record doom: map {map_name!r} must exist, {wad.name} has none")
    game = vizdoom.DoomGame()
    game.load_config(str(config))
    game.set_window_visible(False)
    game.set_screen_resolution(vizdoom.ScreenResolution.RES_320X200)
    game.set_screen_format(vizdoom.ScreenFormat.RGB24)
    game.set_depth_buffer_enabled(True)
    button = vizdoom.Button
    game.set_available_buttons(
        [
            button.MOVE_FORWARD,
            button.MOVE_BACKWARD,
            button.MOVE_LEFT,
            button.MOVE_RIGHT,
            button.ATTACK,
            button.USE,
            button.SPEED,
            button.TURN_LEFT_RIGHT_DELTA,
        ]
    )
    variable = vizdoom.GameVariable
    game.set_available_game_variables([variable.POSITION_X, variable.POSITION_Y, variable.ANGLE])
    game.set_render_hud(False)
    game.set_render_weapon(True)
    for hide in ("crosshair", "messages", "particles", "decals"):
        getattr(game, f"set_render_{hide}")(False)
    game.set_mode(vizdoom.Mode.PLAYER)
    game.set_episode_timeout(0)
    game.set_seed(seed)
    game.add_game_args("-nomonsters +sv_infiniteammo 1 +sv_cheats 1")
    try:
        game.set_doom_map(level)
        game.init()
    except vizdoom.ViZDoomErrorException as error:
        raise InputError(f"record doom: map {map_name!r} must exist, got {error}") from None
    return game


def _openness(depth: np.ndarray) -> np.ndarray:
    """[5]: mean depth of five vertical strips at eye height, 0 near to 1 far."""
    band = depth[depth.shape[0] * 2 // 5 : depth.shape[0] * 3 // 5]
    return np.array([strip.mean() for strip in np.array_split(band, 5, axis=1)]) / 255.0


def record_episode(map_name: str, episode: int, seed: int, frames: int, out: Path) -> int:
    """Play one episode and write it. Returns its number of frames."""
    game = _make_game(map_name, seed)
    height, width = VIDEO_SIZE
    info = {"map": map_name, "episode": episode, "seed": seed}
    video, lines = np.empty((frames, height, width, 3), np.uint8), []
    try:
        game.new_episode()
        game.send_game_command("god")
        rng = np.random.default_rng(seed)
        for _ in range(int(rng.integers(4, 8))):  # the weapon comes up
            game.make_action([0] * 8, TICS_PER_STEP)
        policy, last = Policy(rng), None
        for t in range(frames):
            state = game.get_state()
            if state is None:  # an exit was reached
                break
            x, y, angle = (float(v) for v in state.game_variables)
            position = (x, y, angle)
            moved = (
                99.0 if last is None else abs(position[0] - last[0]) + abs(position[1] - last[1])
            )
            last = position
            image = Image.fromarray(state.screen_buffer)
            video[t] = np.asarray(image.resize((width, height), Image.Resampling.BOX))
            play = policy.step(_openness(state.depth_buffer), moved)
            lines.append(_line(play, info, position, t * TICS_PER_STEP))
            # The recorded pixels are what the game is given: rounding happens once.
            turn = lines[-1]["mouse"]["dx"] * DEGREES_PER_PIXEL / TICS_PER_STEP
            keys = [play.forward_back == 1, play.forward_back == 2]
            keys += [
                play.left_right == 1,
                play.left_right == 2,
                bool(play.attack),
                bool(play.use),
                True,  # run
            ]
            game.make_action([*(float(k) for k in keys), turn], TICS_PER_STEP)
    finally:
        game.close()
    name = _stem(map_name, episode, seed)
    write_video(out / f"{name}.mp4", video[: len(lines)], FPS)
    write_actions(out / f"{name}.jsonl", lines)
    return len(lines)


def _stem(map_name: str, episode: int, seed: int) -> str:
    return f"{map_name.replace(':', '-')}-{episode:04d}-{seed}"


def episode_seed(seed: int, episode: int) -> int:
    """The seed of one episode of a recording session: positive, below 2**31."""
    return int(np.random.SeedSequence([seed, episode]).generate_state(1)[0] >> 1)


def episode_names(episodes: int, seed: int, maps: tuple[str, ...]) -> list[str]:
    """The names of a session's files."""
    return [_stem(maps[i % len(maps)], i, episode_seed(seed, i)) for i in range(episodes)]


def record(
    out: Path,
    episodes: int,
    seed: int,
    maps: tuple[str, ...] = TRAIN_MAPS,
    frames: int = 300,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Record episodes, the maps in turn. Those that already stand in ``out`` are kept.

    The result does not depend on ``workers``. Returns the frames written in this call.
    """
    if episodes < 1 or frames < 2 or workers < 1 or seed < 0 or not maps:
        raise InputError(
            f"record: episodes and workers must be >= 1, frames >= 2, seed >= 0 and maps not none, "
            f"got {episodes}, {workers}, {frames}, {seed}, {len(maps)} maps"
        )
    out = out.resolve()
    if out.exists() and not out.is_dir():
        raise InputError(f"record: {out} must be a folder, it is a file")
    out.mkdir(parents=True, exist_ok=True)
    jobs: list[Job] = []
    for episode, name in enumerate(episode_names(episodes, seed, maps)):
        # The jsonl is written last: where it stands, the episode is whole.
        if not (out / f"{name}.jsonl").exists():
            of_episode = episode_seed(seed, episode)
            jobs.append((maps[episode % len(maps)], episode, of_episode, frames, out))
    done, written = episodes - len(jobs), 0
    if not jobs:
        return 0
    with ThreadPoolExecutor(min(workers, len(jobs))) as pool:
        try:
            for count in pool.map(_in_process, jobs):
                done, written = done + 1, written + count
                if progress:
                    progress(done, episodes)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return written


def _in_process(job: Job) -> int:
    """Play an episode in a process and a folder of its own: the game reads and writes a settings
    file in its working folder.
    """
    words = [str(word) for word in job]
    with TemporaryDirectory() as scratch:
        child = subprocess.run(
            [sys.executable, "-m", "rlir.data.doom", *words],
            cwd=scratch,
            capture_output=True,
            text=True,
            check=False,
        )
    if child.returncode == 0:
        return int(child.stdout.split()[-1])
    last = (child.stderr.strip().splitlines() or ["no message"])[-1]
    if child.returncode == 2:
        raise InputError(last)
    raise OSError(f"record doom: {job[0]} episode {job[1]} ended with {child.returncode}: {last}")


def _main(words: list[str]) -> int:
    try:
        map_name, episode, seed, frames, out = words
        print(record_episode(map_name, int(episode), int(seed), int(frames), Path(out)))
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
