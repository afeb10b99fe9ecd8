"""Steps of post-training of the embedded Doom model, timed; for any version of the package.

    VENV/bin/python benchmarks/peers/train_step.py [--steps 4] [--prompts 4] [--group-size 16]

VENV holds the version that is timed. Prompts are random codes under random actions, since only time
is asked for: 4 x 16 rollouts of 4 frames, drawn, read by the inverse dynamics model, and all of
them updated on. Prints one JSON line of seconds a step, by phase.
"""

import argparse
import dataclasses
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlir.actions.space import action_space
from rlir.grpo.config import GrpoConfig
from rlir.grpo.reward import InverseReward
from rlir.grpo.trainer import GrpoTrainer
from rlir.models.load import load_models

FRAMES, RECORDED = 5, 2000


class RandomClips:
    """What the trainer asks of recorded clips."""

    directory = Path("random")

    def __init__(self, codes: int, tokens: int, sizes: tuple[int, ...]):
        g = torch.Generator().manual_seed(0)
        self.codes = torch.randint(codes, (RECORDED, tokens), generator=g)
        columns = [torch.randint(size, (RECORDED,), generator=g) for size in sizes]
        self.actions = torch.stack(columns, -1)

    def starts(self, frames: int) -> Tensor:
        return torch.arange(0, RECORDED - frames, frames)

    def clip(self, x: Tensor, starts: Tensor, length: int) -> Tensor:
        return torch.stack([x[i : i + length] for i in starts.tolist()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=16)
    parser.add_argument("--trace", type=Path, help="write a torch.profiler trace of a last step")
    options = parser.parse_args()
    models = load_models(None, None, None)
    world = models.world_model
    sizes = action_space(world.config.space).factor_sizes
    clips: Any = RandomClips(world.config.codes, world.config.tokens, sizes)
    known = {x.name for x in dataclasses.fields(GrpoConfig)}
    wanted = {"steps": 1000, "prompts": options.prompts, "group_size": options.group_size}
    wanted |= {"temperature": 0.85, "learning_rate": 2e-4, "kept": 0, "frames": FRAMES}
    config = GrpoConfig(**{k: v for k, v in wanted.items() if k in known})
    trainer = GrpoTrainer(
        config,
        world.requires_grad_(True),
        models.tokenizer,
        InverseReward(models.reward_idm, config),
        clips,
        clips.codes,
    )
    trainer.train_step()
    phases: list[dict[str, float]] = []
    for _ in range(options.steps):
        before, begin = dict(trainer.seconds), time.perf_counter()
        trainer.train_step()
        took = {name: trainer.seconds[name] - before[name] for name in before}
        phases.append({**took, "step": time.perf_counter() - begin})
    if options.trace:
        with torch.profiler.profile() as profile:
            trainer.train_step()
        profile.export_chrome_trace(str(options.trace))
    medians = {name: statistics.median(x[name] for x in phases) for name in phases[0]}
    print(json.dumps({"seconds": medians, "threads": torch.get_num_threads()}))


if __name__ == "__main__":
    main()
