"""What the tests share: tiny models, synthetic recordings, the command line in a process."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from rlir.data.recording import write_actions, write_video
from rlir.models.idm import InverseDynamicsConfig
from rlir.models.tokenizer import TokenizerConfig
from rlir.models.world_model import WorldModelConfig

FULL = os.environ.get("RLIR_FULL_TESTS", "0") not in ("", "0")
"""Whether everything runs, however long it takes: ``make test-full``."""
SIZE = (16, 48)
"""Height and width of the tiny models' frames."""
TOKENIZER = TokenizerConfig(height=16, width=48, levels=(4, 4), channels=8, blocks=1)
WORLD_MODEL = WorldModelConfig(
    codes=16,
    rows=2,
    columns=4,
    hidden=16,
    layers=2,
    mlp=24,
    stem_channels=8,
    stem_blocks=1,
)
IDMS = {
    name: InverseDynamicsConfig(
        architecture=name, height=16, width=48, channels=8, hidden=10, shift=5, max_frames=7
    )
    for name in ("learned", "fixed")
}
KEYS = ("key.keyboard.w", "key.keyboard.s", "key.keyboard.a", "key.keyboard.d")


M = TypeVar("M", bound=nn.Module)


def examples(count: int) -> int:
    """How many examples a property is tried on: ten times as many in a full run."""
    return 10 * count if FULL else count


def stirred(model: M, scale: float = 0.3, seed: int = 0) -> M:
    """The model with noise on every weight: initial values hide what starts at zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return model


def line(keys: Sequence[str] = (), dx: float = 0, buttons: Sequence[int] = (), **more) -> dict:
    """A line of a jsonl."""
    mouse = {"dx": dx, "dy": 0, "buttons": list(buttons)}
    return {"keyboard": {"keys": list(keys)}, "mouse": mouse, **more}


def picture(count: int, seed: int = 0, height: int = 32, width: int = 96) -> np.ndarray:
    """A coloured wall that scrolls, uint8 [count, height, width, 3]."""
    rng = np.random.default_rng(seed)
    wall = rng.integers(40, 216, (height // 8, 4 * width // 8, 3))
    wall = np.kron(wall, np.ones((8, 8, 1))).astype(np.uint8)
    return np.stack([np.roll(wall, -3 * t, 1)[:, :width] for t in range(count)])


def write_recording(
    directory: Path, name: str = "a", frames: int = 20, seed: int = 0, map_name: str = "m"
) -> tuple[Path, Path]:
    """One synthetic episode; its actions are random."""
    rng = np.random.default_rng(seed)
    directory.mkdir(parents=True, exist_ok=True)
    episode = {"map": map_name, "episode": 0, "seed": seed}
    lines = [
        line(
            [key for key in KEYS if rng.random() < 0.3],
            dx=int(rng.integers(-200, 201)),
            buttons=[0] if rng.random() < 0.3 else [],
            **episode,
        )
        for _ in range(frames)
    ]
    video, actions = directory / f"{name}.mp4", directory / f"{name}.jsonl"
    write_video(video, picture(frames, seed), 7.0)
    write_actions(actions, lines)
    return video, actions


def same(a: object, b: object) -> bool:
    """Whether nested dicts, lists and tensors are equal, tensors bit for bit."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and bytes_of(a) == bytes_of(b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def bytes_of(x: Tensor) -> bytes:
    # contiguous() leaves a tensor with one element the stride it has, which no view of bytes takes.
    x = x.detach().clone(memory_format=torch.contiguous_format)
    return x.flatten().view(torch.uint8).numpy().tobytes()


MAIN = "from rlir.cli import main; main()"


DAMAGES = ("missing", "empty", "text", "half", "folder")


def damage(path: Path, kind: str) -> None:
    """What a file may have become."""
    data = path.read_bytes()
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind != "missing":
        path.write_bytes({"empty": b"", "text": b"hello", "half": data[: len(data) // 2]}[kind])


def command(*words: object) -> list[str]:
    """The argument list of an ``rlir`` command."""
    return [sys.executable, "-c", MAIN, *map(str, words)]


def environment(**changes: str) -> dict[str, str]:
    """One thread, and nothing that forces a fallback."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RLIR_")}
    return {**kept, "OMP_NUM_THREADS": "1", **changes}


def rlir(
    *words: object, cwd: Path | None = None, **options: object
) -> subprocess.CompletedProcess[str]:
    """Run an ``rlir`` command to its end."""
    return subprocess.run(
        command(*words),
        cwd=cwd,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        **options,
    )


def one_line(text: str) -> str:
    """The only line of a text."""
    lines = text.strip().splitlines()
    assert len(lines) == 1, text
    return lines[0]
