"""Continued pretraining, the control: it trains, it repeats itself, and the base stays."""

import pytest
import torch
import torch.nn.functional as F
from testkit import WORLD_MODEL, same, stirred
from torch import Tensor

from rlir.data.clips import Clips
from rlir.errors import InputError
from rlir.grpo.control import ControlConfig, continue_pretraining
from rlir.models.world_model import WorldModel

CONFIG = ControlConfig(steps=25, batch=8, warmup=3)


@pytest.fixture
def codes(clips: Clips) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(16, (len(clips.frames), 8), generator=generator)


@torch.no_grad()
def loss(model: WorldModel, clips: Clips, codes: Tensor) -> float:
    starts = clips.starts(4)
    batch, actions = clips.clip(codes, starts, 4), clips.clip(clips.actions, starts, 4)[:, :-1]
    logits = model(batch, model.action_ids(actions))
    return float(F.cross_entropy(logits.flatten(0, 2), batch[:, 1:].flatten()))


def test_it_lowers_the_training_loss_and_leaves_the_base(
    clips: Clips, codes: Tensor, world_model: WorldModel
) -> None:
    before = {k: v.clone() for k, v in world_model.state_dict().items()}
    steps = []
    trained = continue_pretraining(
        world_model, clips, codes, 4, CONFIG, 5e-3, lambda step, _: steps.append(step)
    )
    assert loss(trained, clips, codes) < loss(world_model, clips, codes) - 0.2
    assert same(world_model.state_dict(), before)
    assert steps == list(range(1, 26))
    assert not trained.training
    assert not any(p.requires_grad for p in trained.parameters())


def test_the_same_seed_gives_the_same_bits(clips: Clips, codes: Tensor) -> None:
    def run(seed: int, rate: float = 1e-3) -> dict[str, Tensor]:
        base = stirred(WorldModel(WORLD_MODEL), seed=3)
        torch.manual_seed(seed + 50)  # what torch's own generator holds does not matter
        config = ControlConfig(steps=3, batch=4, warmup=1, seed=seed)
        return continue_pretraining(base, clips, codes, 4, config, rate).state_dict()

    torch.manual_seed(0)
    first = run(0)
    torch.manual_seed(0)
    assert same(run(0), first)
    torch.manual_seed(0)
    assert not same(run(1), first)
    torch.manual_seed(0)
    assert not same(run(0, 2e-3), first)


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0},
        {"batch": 0},
        {"learning_rates": ()},
        {"learning_rates": (1e-4, 0.0)},
        {"seed": -3},
    ],
)
def test_settings_without_sense_are_refused(wrong: dict) -> None:
    with pytest.raises(InputError):
        ControlConfig(**wrong)
