"""Tiny models, prompts and schedules that the tests of rollouts share."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from testkit import WORLD_MODEL, stirred

from rlir.actions.space import DOOM
from rlir.models.world_model import WorldModel, WorldModelConfig
from rlir.rollout import engine as engine_module
from rlir.rollout.sampling import Sampling
from rlir.rollout.schedule import Schedule, diagonal, sequential
from rlir.rollout.stepwise import StepwiseEngine
from rlir.rollout.trajectories import Prompt, Trajectories

SHAPES = {
    "tiny": {},
    "odd": {"rows": 3, "columns": 5, "frames": 3, "hidden": 48, "heads": 3, "kv_heads": 1},
    "one token": {"rows": 1, "columns": 1, "hidden": 16, "heads": 8, "kv_heads": 8, "mlp": 1},
    "several blocks of keys": {"rows": 8, "columns": 7, "frames": 3},
    "no blocks": {"rows": 4, "columns": 2, "stem_blocks": 0, "layers": 1},
    "neither stem nor slot embeddings": {"stem_channels": 0, "slot_embeddings": False},
}


def config_of(shape: str = "tiny", **sizes: int) -> WorldModelConfig:
    return dataclasses.replace(WORLD_MODEL, **{**SHAPES[shape], **sizes})


def make(shape: str = "tiny", seed: int = 0, **sizes: int) -> WorldModel:
    torch.manual_seed(seed)
    return stirred(WorldModel(config_of(shape, **sizes)), seed=seed).eval()


def prompt(model: WorldModel, context: int, actions: int, seed: int = 0) -> Prompt:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(model.config.codes, (context, model.config.tokens), generator=generator)
    columns = [torch.randint(size, (actions,), generator=generator) for size in DOOM.factor_sizes]
    return Prompt(codes, torch.stack(columns, -1))


def mixed_prompts(model: WorldModel) -> list[Prompt]:
    """Of several contexts and lengths, one of them with nothing to draw, one longer than clips."""
    frames = model.config.frames
    sizes = [(1, 2), (2, 2), (1, 2), (3, 2), (2, frames + 1), (1, 1)]
    return [prompt(model, *size, seed=i) for i, size in enumerate(sizes)]


SEQUENTIAL = sequential()


def roll_out(
    model: WorldModel,
    prompts: list[Prompt],
    schedule: Schedule = SEQUENTIAL,
    dtype: torch.dtype = torch.float32,
    **more: object,
) -> Trajectories:
    options = {"sampling": Sampling(temperature=0.85), "seed": 3, **more}
    return StepwiseEngine(model, dtype).rollout(prompts, schedule=schedule, **options)


def _mask_takes_refresh() -> bool:
    try:
        diagonal(1, "refresh").plan(2, 2).mask(0, 1, None)
    except TypeError:
        return False
    return True


ROW_ENDS = [
    "prompt",
    pytest.param(
        "refresh",
        marks=pytest.mark.skipif(
            not _mask_takes_refresh(), reason="the diagonal mask takes no refresh"
        ),
    ),
]
row_ends = pytest.mark.parametrize("row_end", ROW_ENDS)


def schedules(model: WorldModel, row_end: str) -> list[Schedule]:
    """Raster order, and every window."""
    windows = range(1, model.config.columns + 2)
    return [Schedule(), *(diagonal(window, row_end) for window in windows)]


@contextmanager
def poisoned_caches() -> Iterator[None]:
    """What the engine allocates and does not write holds NaN."""
    real = torch.empty

    def poisoned(*sizes: object, **options: object) -> torch.Tensor:
        x = real(*sizes, **options)
        if x.is_floating_point():
            return x.fill_(torch.nan)
        return x.fill_(0x7FC07FC0) if x.dtype == torch.int32 else x  # two bfloat16

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_module.torch, "empty", poisoned)
        yield
