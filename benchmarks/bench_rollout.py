"""Group rollouts: the engine against language-model servers and plain PyTorch.

    python benchmarks/bench_rollout.py [ROW ...] [--rounds 3] [--vllm PYTHON] [--preload LIB ...]
                                       [--first PYTHON]

Rows (all by default): `mineworld` (one prompt of 8 frames of MineWorld-300M, 16 rollouts of a
frame), `many` (16 such prompts within 12 GiB), `doom` (the embedded model), `step` (a whole step of
post-training, beside another version of the package, whose Python is --first: that of commit
12b4933, made by `make` in a checkout of it, is the first version). Peers: transformers'
generate; vLLM in an environment of its own, made by benchmarks/peers/make_vllm_environment.py and
left out without --vllm; benchmarks/peers/plain_loop.py. Weights of MineWorld's shape are random.

The engine's runs and the peers' processes take turns. transformers is timed over a few tokens and
its time for the frame is that of its median step. The limit is rlir.rollout.cost at the rates of a
large bfloat16 product and of a copy, measured in the same run.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness import emit, interleave, machine, table
from peers.llama_checkpoint import main as make_checkpoint
from peers.plain_loop import plain_rollout

from rlir.actions.space import action_space
from rlir.models.llama import load_llama
from rlir.models.load import EMBEDDED, load_world_model
from rlir.models.world_model import WorldModel, WorldModelConfig
from rlir.rollout import cost
from rlir.rollout.engine import RolloutEngine
from rlir.rollout.sampling import Sampling, greedy
from rlir.rollout.schedule import Schedule, diagonal, sequential
from rlir.rollout.stepwise import inference_copy
from rlir.rollout.trajectories import Prompt, Trajectories

GROUP, CONTEXT, SIDE, COPIED = 16, 8, 4096, 2**28
TOP_P = Sampling(top_p=0.8)
PEERS = Path(__file__).parent / "peers"


def limits() -> tuple[float, float]:
    """FLOP/s of a large bfloat16 product and bytes/s, read and written, of a copy."""
    square = torch.randn(SIDE, SIDE).bfloat16()
    source, target = torch.ones(COPIED // 4), torch.ones(COPIED // 4)
    calls = {"product": lambda: square @ square, "copy": lambda: target.copy_(source)}
    times = interleave(calls, 5, seconds=0.2, warmup=2)
    return 2 * SIDE**3 / times["product"], 2 * COPIED / times["copy"]


def prompt(config: WorldModelConfig, context: int, frames: int, seed: int) -> Prompt:
    generator = torch.Generator().manual_seed(seed)
    sizes = action_space(config.space).factor_sizes
    count = (context - 1 + frames,)
    actions = torch.stack([torch.randint(n, count, generator=generator) for n in sizes], -1)
    return Prompt(
        torch.randint(config.codes, (context, config.tokens), generator=generator), actions
    )


def least(
    config: WorldModelConfig, schedule: Schedule, rates: tuple[float, float], **sizes: int
) -> float:
    """Seconds that the work takes at the machine's rates."""
    plan, frames = schedule.plan(config.rows, config.columns), sizes.pop("frames")
    passes = [cost.prefill(config, sizes["context"])] * sizes["groups"]
    for frame in range(sizes["context"], sizes["context"] + frames):
        passes += cost.steps(config, plan, frame=frame, **sizes)
    return cost.seconds_of(passes, *rates)


class PeerError(Exception):
    """A peer's process came to an end without a result."""


def peer(python: str, script: str, *options: object) -> dict[str, Any]:
    """A peer's own process; its line of JSON."""
    command = [python, PEERS / script, *options]
    done = subprocess.run(
        [str(x) for x in command],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        raise PeerError(f"{script} ended with {done.returncode}: {done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def timed(call: Callable[[], Trajectories]) -> tuple[float, Trajectories]:
    begin = time.perf_counter()
    out = call()
    return time.perf_counter() - begin, out


def turns(
    candidates: dict[str, Callable[[], tuple[float, float]]], rounds: int, failed: list[str]
) -> dict[str, tuple[float, float]]:
    """Medians of (prefill, total) seconds; each candidate once a round. Who fails is left out,
    and put down in ``failed``."""
    seen: dict[str, list[tuple[float, float]]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name in list(seen):
            try:
                seen[name].append(candidates[name]())
            except PeerError as failure:
                print(f"  {name} is left out: {failure}", file=sys.stderr)
                failed.append(name)
                del seen[name]
                continue
            print(f"  {name}: {seen[name][-1][1]:.2f} s", file=sys.stderr)
    return {
        name: (statistics.median(x for x, _ in runs), statistics.median(x for _, x in runs))
        for name, runs in seen.items()
    }


def mineworld(options: argparse.Namespace, folder: Path, prompts: int) -> dict[str, Any]:
    """MineWorld-300M's shape: 2,776 tokens of prompt, a frame of 336 for each rollout."""
    checkpoint = folder / "llama-300m"
    if not checkpoint.exists():
        sys.argv = ["llama_checkpoint.py", str(checkpoint)]
        make_checkpoint()
    rates = limits()
    model = load_llama(checkpoint, rows=14, columns=24, frames=16)
    config = model.config
    engine = RolloutEngine(model, max_bytes=12 * 2**30)
    small = RolloutEngine(model, max_bytes=12 * 2**30, weights="int8")
    del model
    given = [prompt(config, CONTEXT, 1, seed) for seed in range(prompts)]
    call = {"group_size": GROUP, "sampling": TOP_P}
    print(f"  {engine.memory(given, **call)}", file=sys.stderr)

    def ours(of: RolloutEngine, schedule: Schedule) -> Callable[[], tuple[float, float]]:
        def run() -> tuple[float, float]:
            total, drawn = timed(lambda: of.rollout(given, **call, schedule=schedule, seed=0))
            return drawn.timings["prefill"], total

        return run

    def theirs(python: str, script: str, *more: object) -> Callable[[], tuple[float, float]]:
        def run() -> tuple[float, float]:
            found = peer(python, script, checkpoint, "--prompts", prompts, *more)
            first = found["prefill_seconds"]
            if "--new-tokens" in more:
                return first, first + found["step_ms"] * 335 / 1e3
            return first, found["total_seconds"]

        return run

    candidates = {
        "engine, sequential": ours(engine, sequential()),
        "engine, diagonal(2)": ours(engine, diagonal(2)),
    }
    if prompts == 1:
        candidates["engine, sequential, int8"] = ours(small, sequential())
    preload = ("--preload", *options.preload) if options.preload else ()
    if options.vllm:
        # vLLM reserves all of its cache, beside the engine's process. The many prompts and what
        # follows them take 2.7 GiB of the 5.8 that are left for it here.
        room = ("--memory-gib", 4 if prompts == 1 else 8)
        candidates["vLLM"] = theirs(options.vllm, "generate_vllm.py", *room, *preload)
    if prompts == 1:
        candidates["engine, sequential"]()  # the first touches of everything
        medians = turns(candidates, options.rounds, options.failed)
        # Minutes, and far behind: once.
        plain = theirs(sys.executable, "generate_transformers.py", "--new-tokens", 8)
        medians |= turns({"transformers": plain}, 1, options.failed)
    else:
        medians = turns(candidates, 1, options.failed)
    sizes = {"groups": prompts, "group_size": GROUP, "context": CONTEXT, "frames": 1}
    ideal = {
        name: least(config, diagonal(2) if "diagonal" in name else sequential(), rates, **sizes)
        for name in medians
    }
    report(f"MineWorld-300M, {prompts} x {GROUP}", medians, ideal, prompts * GROUP)
    print(f"product {rates[0] / 1e9:.0f} GFLOP/s, copy {rates[1] / 1e9:.1f} GB/s")
    return {
        "row": "mineworld" if prompts == 1 else "many",
        "seconds": {k: [round(x, 2) for x in v] for k, v in medians.items()},
        "percent_of_limit": {k: round(100 * ideal[k] / v[1], 1) for k, v in medians.items()},
        "gflops": round(rates[0] / 1e9, 1),
        "gbytes": round(rates[1] / 1e9, 1),
    }


def report(
    title: str, medians: dict[str, tuple[float, float]], ideal: dict[str, float], frames: int
) -> None:
    first = medians["engine, sequential"][1]
    rows = [
        (
            name,
            f"{prefill:.2f}",
            f"{total:.2f}",
            f"{frames / total:.2f}",
            f"{total / first:.2f}",
            f"{100 * ideal[name] / total:.0f}",
        )
        for name, (prefill, total) in medians.items()
    ]
    print(table((title, "prefill s", "s", "frames/s", "x engine", "% of limit"), rows))


def agreement(engine: RolloutEngine, given: list[Prompt]) -> dict[str, float]:
    """Share of tokens that greedy diagonal decoding draws as raster order does."""
    found = {}
    plain = engine.rollout(given, sampling=greedy(), seed=0)
    for row_end in ("prompt", "refresh"):
        for window in (2, 4):
            other = engine.rollout(
                given, sampling=greedy(), schedule=diagonal(window, row_end), seed=0
            )
            same = (plain.codes == other.codes)[:, 1:][plain.drawn]
            found[f"diagonal({window}, {row_end})"] = round(float(same.float().mean()), 3)
    return found


def doom(options: argparse.Namespace) -> dict[str, Any]:
    """The embedded model: 4 prompts x 16, 4 frames."""
    rates = limits()
    model: WorldModel = load_world_model(EMBEDDED / "world-model")
    config, prompts = model.config, 4
    given = [prompt(config, 1, config.frames - 1, seed) for seed in range(prompts)]
    first = torch.cat([x.codes for x in given])
    blocks = model.action_ids(torch.stack([x.actions for x in given]))
    policy, engine = inference_copy(model), RolloutEngine(model)
    calls = {
        "engine, sequential": lambda: engine.rollout(given, group_size=GROUP, seed=0),
        "engine, diagonal(2)": lambda: engine.rollout(
            given, group_size=GROUP, schedule=diagonal(2), seed=0
        ),
        "packing": lambda: RolloutEngine(model),
        "plain loop": lambda: plain_rollout(policy, first, blocks, GROUP),
    }
    times = interleave(calls, max(5, options.rounds), seconds=0.1, warmup=1)
    packing = times.pop("packing")
    sizes = {"groups": prompts, "group_size": GROUP, "context": 1, "frames": config.frames - 1}
    ideal = {
        name: least(config, diagonal(2) if "diagonal" in name else sequential(), rates, **sizes)
        for name in times
    }
    frames = prompts * GROUP * (config.frames - 1)
    report("Doom, 4 x 16, 4 frames", {k: (0.0, v) for k, v in times.items()}, ideal, frames)
    agrees = agreement(engine, given)
    print(f"packing {1e3 * packing:.0f} ms; product {rates[0] / 1e9:.0f} GFLOP/s")
    print(f"greedy tokens as in raster order: {agrees}")
    return {
        "row": "doom",
        "seconds": {k: round(v, 4) for k, v in times.items()},
        "times_plain_loop": round(times["plain loop"] / times["engine, sequential"], 2),
        "percent_of_limit": {k: round(100 * ideal[k] / v, 1) for k, v in times.items()},
        "agreement": agrees,
        "gflops": round(rates[0] / 1e9, 1),
    }


def step(options: argparse.Namespace) -> dict[str, Any]:
    """A step of post-training, of this version and of another one, process by process in turn."""
    pythons = {"now": sys.executable}
    if options.first:
        pythons = {"first version": options.first, **pythons}
    seen: dict[str, list[dict[str, float]]] = {name: [] for name in pythons}
    for _ in range(options.rounds):
        for name, python in pythons.items():
            found = peer(python, "train_step.py")
            seen[name].append(found["seconds"])
            print(f"  {name}: {found['seconds']['step']:.2f} s", file=sys.stderr)
    phases = list(seen["now"][0])
    medians = {
        name: {x: statistics.median(run[x] for run in runs) for x in phases}
        for name, runs in seen.items()
    }
    rows = [(name, *(f"{x[phase]:.2f}" for phase in phases)) for name, x in medians.items()]
    if options.first:
        times = {x: medians["first version"][x] / medians["now"][x] for x in phases}
        rows.append(("", *(f"{times[x]:.1f}x" for x in phases)))
    print(table(("a step, 4 prompts x 16, s", *phases), rows))
    return {"row": "step", "seconds": medians}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", nargs="*", default=["doom", "step", "mineworld", "many"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--vllm", help="the Python of vLLM's environment")
    parser.add_argument("--preload", nargs="*", default=[], help="libraries for vLLM")
    parser.add_argument("--first", help="the Python of another version of the package, for `step`")
    parser.add_argument("--folder", type=Path, help="for the random checkpoint")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    where = machine()
    print("  ".join(f"{k} {v}" for k, v in where.items()))
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        options.failed, results = [], []
        for row in options.rows:
            try:
                if row in ("doom", "step"):
                    results.append((doom if row == "doom" else step)(options))
                else:
                    results.append(mineworld(options, folder, 1 if row == "mineworld" else 16))
            except PeerError as failure:
                print(f"{row}: {failure}", file=sys.stderr)
                options.failed.append(row)
    emit("rollout", {"machine": where, "results": results})
    sys.exit(1 if options.failed else 0)


if __name__ == "__main__":
    main()
