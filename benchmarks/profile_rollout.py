"""Where a rollout step's time goes, and how it grows: two pictures for docs/rollout.md.

    RLIR_OPS_LIBRARY=.../librlir_ops.so python benchmarks/profile_rollout.py [--out docs/images]

Needs Linux's perf, and the library with its symbols, as the build folder has it. Runs itself under
perf with one thread: MineWorld-300M's shape with 4 of its 20 layers, and the embedded Doom model.
Growth, one thread too: the same shape by group size, context and width, beside what
rlir.rollout.cost says at the rates measured in the same run.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from bisect import bisect
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from bench_rollout import least, limits, prompt
from harness import machine

from rlir.models.load import EMBEDDED, load_world_model
from rlir.models.world_model import WorldModel, WorldModelConfig
from rlir.rollout.engine import RolloutEngine
from rlir.rollout.sampling import Sampling
from rlir.rollout.schedule import Schedule, diagonal, sequential

SHAPE = WorldModelConfig(
    space="mineworld", codes=8192, rows=14, columns=24, frames=16, hidden=1024, layers=4,
    heads=16, kv_heads=4, mlp=4096, stem_channels=0, slot_embeddings=False, action_vocabulary=70,
)  # fmt: skip
PHASES = {
    "products": ("decoder_multiply.cpp", ""),
    "prompt's keys and values": ("group_decode_attention.cpp", ""),
    "prefill's attention": ("video_attention.cpp", ""),
    "rotation, writing": ("decoder.cpp", "append|rotate|clear|place"),
    "norms": ("decoder.cpp", "norm"),
    "own keys and values": ("decoder.cpp", ""),
    "stem": ("stem.cpp", ""),
    "sampling": ("sample_tokens.cpp", ""),
    "steps": ("decoder_frame.cpp", ""),
}
"""Of a sample in a source file of the library and a function that matches, the first that fits."""
RUNS = {
    "MineWorld-300M, raster": ("mineworld", sequential()),
    "MineWorld-300M, diagonal(2)": ("mineworld", diagonal(2)),
    "Doom, raster": ("doom", sequential()),
}


def roll(model: str, schedule: Schedule) -> None:
    """What is profiled."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if model == "doom":
        world = load_world_model(EMBEDDED / "world-model")
        given = [prompt(world.config, 1, 4, seed) for seed in range(4)]
        engine = RolloutEngine(world)
        for seed in range(12):
            engine.rollout(given, group_size=16, schedule=schedule, seed=seed)
        return
    engine = RolloutEngine(WorldModel(SHAPE).requires_grad_(False))
    given = [prompt(SHAPE, 8, 1, 0)]
    for seed in range(2):
        engine.rollout(
            given, group_size=16, schedule=schedule, sampling=Sampling(top_p=0.8), seed=seed
        )


class Symbols:
    """Which source file and function an address of the library is in."""

    def __init__(self, library: Path):
        listing = run("readelf", "-sW", library)
        table = listing[listing.index("'.symtab'") :]
        self.starts: list[tuple[int, str, str]] = []
        file = ""
        for line in table.splitlines():
            parts = line.split(maxsplit=7)
            if len(parts) < 8:
                continue
            if parts[3] == "FILE":
                file = parts[7]
            elif parts[3] == "FUNC" and parts[6] != "UND":
                # Functions that other files call stand apart from theirs: by their name.
                where = file_of(parts[7]) or file
                self.starts.append((int(parts[1], 16), where, parts[7]))
        self.starts.sort()
        self.keys = [start for start, _, _ in self.starts]
        self.segments = [
            (int(x[1], 16), int(x[2], 16), int(x[4], 16))
            for x in (line.split() for line in run("readelf", "-lW", library).splitlines())
            if x[:1] == ["LOAD"]
        ]

    def at(self, offset: int) -> tuple[str, str]:
        """Of an offset in the library's file."""
        for start, address, size in self.segments:
            if start <= offset < start + size:
                _, file, name = self.starts[bisect(self.keys, offset - start + address) - 1]
                return file, name
        return "", ""


def file_of(symbol: str) -> str:
    """The source file of a kernel that other files call."""
    for name, file in (
        ("decoder_multiply", "decoder_multiply.cpp"),
        ("decode_prefix", "group_decode_attention.cpp"),
        ("sample_tokens", "sample_tokens.cpp"),
        ("stem_rollout", "stem.cpp"),
        ("decoder_frame", "decoder_frame.cpp"),
        ("decoder_", "decoder.cpp"),
    ):
        if name in symbol:
            return file
    return ""


def run(*command: object) -> str:
    return subprocess.run(
        [str(x) for x in command], check=True, capture_output=True, text=True
    ).stdout


def shares(name: str) -> dict[str, float]:
    """Percent of the native time by phase, prefill included."""
    library = Path(os.environ["RLIR_OPS_LIBRARY"])
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "perf.data"
        run(
            *("perf", "record", "-q", "-F", 999, "-o", data),
            sys.executable,
            __file__,
            "--roll",
            name,
        )
        script = run("perf", "script", "-i", data, "--show-mmap-events", "-F", "comm,event,ip,dso")
    mapped = re.compile(rf"\[0x(\w+)\(0x(\w+)\) @ (?:0x)?(\w+) .* \S*x\S* .*{library.name}")
    places, symbols = [], Symbols(library)
    counts: Counter[str] = Counter()
    for line in script.splitlines():
        if found := mapped.search(line):
            places.append(tuple(int(x, 16) for x in found.groups()))
            continue
        sample = re.search(rf"(\w+) \(\S*{library.name}", line)
        if not sample:
            continue
        ip = int(sample[1], 16)
        offset = next((ip - at + first for at, size, first in places if at <= ip < at + size), -1)
        file, symbol = symbols.at(offset)
        for phase, (of, pattern) in PHASES.items():
            if of == file and re.search(pattern, symbol):
                counts[phase] += 1
                break
    whole = sum(counts.values())
    return {phase: round(100 * counts[phase] / whole, 1) for phase in PHASES}


def draw_shares(found: dict[str, dict[str, float]], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(9, 2.6), layout="constrained")
    left = [0.0] * len(found)
    for phase in PHASES:
        width = [of[phase] for of in found.values()]
        bars = axes.barh(list(found), width, left=left, label=phase)
        axes.bar_label(bars, [f"{x:.0f}" if x >= 4 else "" for x in width], label_type="center")
        left = [x + y for x, y in zip(left, width, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("% of a rollout's time, prefill included")
    axes.set_xlim(0, 100)
    axes.legend(ncols=4, loc="upper center", bbox_to_anchor=(0.45, -0.25), frameon=False)
    figure.savefig(path, dpi=120)


def growth(rates: tuple[float, float]) -> dict[str, list[tuple[float, float, float]]]:
    """(what changes, seconds measured, seconds of the cost model) of prefill and a frame."""

    def measure(config: WorldModelConfig, context: int, group: int) -> tuple[float, float]:
        torch.manual_seed(0)
        engine = RolloutEngine(WorldModel(config).requires_grad_(False))
        given, took = [prompt(config, context, 1, 0)], []
        for seed in range(3):
            out = engine.rollout(given, group_size=group, seed=seed)
            took.append(out.timings["prefill"] + out.timings["decode"])
        sizes = {"groups": 1, "group_size": group, "context": context, "frames": 1}
        return sorted(took)[1], least(config, sequential(), rates, **sizes)

    points: dict[str, list[tuple[float, float, float]]] = {}
    sweep: dict[str, tuple[list[int], Callable[[int], tuple[float, float]]]] = {
        "rollouts a group": ([1, 4, 16, 64], lambda n: measure(SHAPE, 8, n)),
        "frames of context": ([1, 4, 8, 15], lambda n: measure(SHAPE, n, 16)),
        "hidden size": (
            [512, 1024, 2048],
            lambda n: measure(replace(SHAPE, hidden=n, heads=n // 64, mlp=4 * n), 8, 16),
        ),
    }
    for what, (values, call) in sweep.items():
        points[what] = [(n, *call(n)) for n in values]
        print(what, [(n, round(x, 3), round(y, 3)) for n, x, y in points[what]])
    return points


def draw_growth(points: dict[str, list[tuple[float, float, float]]], path: Path) -> None:
    figure, row = plt.subplots(1, 3, figsize=(9, 2.8), layout="constrained")
    for axes, (what, found) in zip(row, points.items(), strict=True):
        n, measured, model = zip(*found, strict=True)
        axes.plot(n, measured, "o-", label="measured")
        axes.plot(n, model, "--", color="grey", label="cost model, at the machine's limit")
        axes.set_xlabel(what)
        axes.set_ylim(0, None)
    row[0].set_ylabel("s, prefill and a frame")
    row[0].legend(frameon=False, fontsize=7, loc="lower right")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    parser.add_argument("--roll", choices=list(RUNS))
    options = parser.parse_args()
    if options.roll:
        roll(*RUNS[options.roll])
        return
    torch.set_num_threads(1)
    print("  ".join(f"{k} {v}" for k, v in machine().items()))
    found = {name: shares(name) for name in RUNS}
    for name, of in found.items():
        print(name, of)
    draw_shares(found, options.out / "rollout-step.png")
    rates = limits()
    print(f"product {rates[0] / 1e9:.0f} GFLOP/s, copy {rates[1] / 1e9:.1f} GB/s")
    draw_growth(growth(rates), options.out / "rollout-growth.png")


if __name__ == "__main__":
    main()
