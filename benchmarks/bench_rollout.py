"""Group rollouts of the embedded Doom model: the engine against plain PyTorch, by turns.

    python benchmarks/bench_rollout.py [--rounds 5] [--prompts 4] [--threads N] [--cpu-time]

Peer: benchmarks/peers/plain_loop.py. The limit is what the products alone would take at the
machine's bfloat16 rate, measured in the same run on a large product; attention over the cache,
norms and sampling come on top of it and are not counted.
"""

import argparse
import time
from collections.abc import Callable

import torch
from harness import emit, interleave, machine, table
from peers.plain_loop import plain_rollout

from rlir.actions.space import action_space
from rlir.models.load import EMBEDDED, load_world_model
from rlir.models.world_model import WorldModel
from rlir.rollout.engine import RolloutEngine
from rlir.rollout.stepwise import inference_copy
from rlir.rollout.trajectories import prompts_of

GROUP, SIDE = 16, 2048


def flops(model: WorldModel, prompts: int, rollouts: int, frames: int) -> float:
    """Multiplications and additions of all products with weights."""
    config, stem = model.config, model.stem
    layer = sum(p.numel() for x in model.layers for p in x.parameters() if p.dim() == 2)
    fed = (frames - 1) * config.block - 1  # the last token is never fed
    convolutions = sum(p.numel() for p in stem.parameters() if p.dim() == 4)
    a_token = convolutions + stem.output.weight.numel()
    drawn = (frames - 1) * config.tokens
    head = model.lm_head.weight.numel()
    return 2.0 * (
        prompts * config.tokens * layer + rollouts * (fed * layer + drawn * (head + a_token))
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cpu-time", action="store_true", help="one thread, on a busy machine")
    options = parser.parse_args()
    torch.set_num_threads(1 if options.cpu_time else options.threads)
    clock = time.process_time if options.cpu_time else time.perf_counter
    where = machine()
    print("  ".join(f"{k} {v}" for k, v in where.items()))

    model = load_world_model(EMBEDDED / "world-model")
    config, generator = model.config, torch.Generator().manual_seed(0)
    n = options.prompts
    prompts = torch.randint(config.codes, (n, config.tokens), generator=generator)
    sizes = action_space(config.space).factor_sizes
    columns = [torch.randint(x, (n, config.frames - 1), generator=generator) for x in sizes]
    actions = torch.stack(columns, -1)
    policy, blocks = inference_copy(model), model.action_ids(actions)
    engine = RolloutEngine(model)
    square = torch.randn(SIDE, SIDE, generator=generator).bfloat16()
    calls: dict[str, Callable[[], object]] = {
        "engine": lambda: engine.rollout(prompts_of(prompts, actions), group_size=GROUP, seed=0),
        "packing": lambda: RolloutEngine(model),
        "plain loop": lambda: plain_rollout(policy, prompts, blocks, GROUP),
        "product": lambda: square @ square,
    }
    times = interleave(calls, options.rounds, warmup=1, clock=clock)
    rollouts, work = n * GROUP, flops(model, n, n * GROUP, config.frames)
    rate = 2 * SIDE**3 / times["product"]
    limit = work / rate
    rows = [
        (
            name,
            f"{times[name]:.3f}",
            f"{rollouts * (config.frames - 1) / times[name]:.0f}",
            f"{times['plain loop'] / times[name]:.1f}",
            f"{100 * limit / times[name]:.0f}",
        )
        for name in ("engine", "plain loop")
    ]
    header = (
        f"{n} prompts x {GROUP}, {config.frames - 1} frames",
        *("s", "frames/s", "x plain loop", "% of limit"),
    )
    print(table(header, rows))
    print(f"packing {1e3 * times['packing']:.0f} ms; product {rate / 1e9:.0f} GFLOP/s")
    result = {
        "cpu_time": options.cpu_time,
        "prompts": n,
        "group_size": GROUP,
        "seconds": {k: round(s, 4) for k, s in times.items()},
        "gflops": round(rate / 1e9, 1),
        "times_plain_loop": round(times["plain loop"] / times["engine"], 2),
        "percent_of_limit": round(100 * limit / times["engine"], 1),
    }
    emit("rollout", {"machine": where, "results": [result]})


if __name__ == "__main__":
    main()
