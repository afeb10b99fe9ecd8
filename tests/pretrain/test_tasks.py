"""What is trained is repeatable, and held-out figures say what they are called."""

from pathlib import Path

import pytest
import torch
from testkit import IDMS, SIZE, TOKENIZER, WORLD_MODEL, stirred, write_recording
from torch import Tensor

from rlir.actions.space import DOOM
from rlir.data.clips import Clips, open_clips
from rlir.data.doom import episode_names
from rlir.errors import InputError
from rlir.models.tokenizer import Tokenizer
from rlir.presets import Recording
from rlir.pretrain import stages
from rlir.pretrain.idm import InverseDynamicsTask, InverseDynamicsTraining, reconstructions
from rlir.pretrain.stages import pretrain_tokenizer, record_set
from rlir.pretrain.tokenizer import TokenizerTask, TokenizerTraining, psnr
from rlir.pretrain.world_model import WorldModelTask, WorldModelTraining, visual_codes
from rlir.training import FitConfig, Task, step_generator

FIT = FitConfig(steps=4, batch=4, warmup=1, seed=3)


def nothing(done: int, total: int) -> None:
    pass


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Clips:
    """Clips whose cache may be written to."""
    directory = tmp_path_factory.mktemp("own")
    for i in range(2):
        write_recording(directory, f"e{i}", 30, seed=i)
    return open_clips(directory, DOOM, *SIZE)


def tasks(own: Clips) -> dict[str, Task]:
    torch.manual_seed(0)
    tokenizer = Tokenizer(TOKENIZER).eval()
    codes = visual_codes(own, tokenizer, "x", nothing)
    drawn = reconstructions(own, tokenizer, "x", nothing)
    idm = InverseDynamicsTraining(IDMS["fixed"], FIT, validation_clips=6)
    world = WorldModelTraining(WORLD_MODEL, FIT, validation_clips=6)
    return {
        "tokenizer": TokenizerTask(TokenizerTraining(TOKENIZER, FIT), own, own),
        "idm": InverseDynamicsTask(idm, (own, drawn), (own, drawn)),
        "world model": WorldModelTask(world, (own, codes), (own, codes)),
    }


@pytest.mark.parametrize("name", ["tokenizer", "idm", "world model"])
def test_a_step_depends_on_the_seed_and_the_step_alone(own: Clips, name: str) -> None:
    def loss(step: int) -> tuple[float, Tensor]:
        task = tasks(own)[name]
        task.model.train()
        torch.manual_seed(torch.seed())
        value, _ = task.loss(step_generator(0, step))
        value.backward()
        return float(value.detach()), torch.cat([p.grad.flatten() for p in task.model.parameters()])

    first, again, other = loss(1), loss(1), loss(2)
    assert first[0] == again[0]
    assert torch.equal(first[1], again[1])
    assert first[0] != other[0]


@pytest.mark.parametrize("name", ["tokenizer", "idm", "world model"])
def test_weights_are_those_of_the_seed(own: Clips, name: str) -> None:
    first, again = tasks(own)[name].model, tasks(own)[name].model
    for a, b in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def test_evaluations_name_every_factor(own: Clips) -> None:
    figures = tasks(own)["idm"].evaluate()
    for kind in ("real", "tokenised"):
        parts = [figures[f"{kind}_{factor}"] for factor in DOOM.factor_names]
        assert figures[f"{kind}_accuracy"] == pytest.approx(sum(parts) / len(parts), abs=1e-6)


def test_a_world_model_that_uses_its_actions_has_a_gap(own: Clips) -> None:
    """Trained to predict the clips, it does worse when they swap their actions."""
    task = tasks(own)["world model"]
    stirred(task.model, 0.1)
    optimizer = torch.optim.AdamW(task.model.parameters(), lr=1e-2)
    assert abs(task.evaluate()["action_gap"]) < 0.2
    before = task.evaluate()["validation_loss"]
    for _ in range(60):
        loss = task.clip_loss(task.held_out, task.held_out_actions)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = task.evaluate()
    assert after["validation_loss"] < before
    assert after["action_gap"] > 0.05


def test_codes_are_those_of_the_frames(own: Clips, tokenizer: Tokenizer) -> None:
    codes = visual_codes(own, tokenizer, "codes-test", nothing)
    assert codes.shape == (60, TOKENIZER.tokens)
    assert codes.dtype == torch.int64
    again = visual_codes(own, tokenizer, "codes-test", nothing)
    assert torch.equal(codes, again)


def test_psnr_is_twenty_decibels_for_a_tenth_of_the_range() -> None:
    frames = torch.zeros(2, 3, 4, 4)
    torch.testing.assert_close(psnr(frames + 0.2, frames), torch.full((2,), 20.0))
    assert psnr(frames, frames).isfinite().all()


def test_a_stage_refuses_to_validate_on_its_training_data(tmp_path: Path) -> None:
    for name in ("train", "validation"):
        write_recording(tmp_path / "data" / name, "e", 8, seed=1)
    config = TokenizerTraining(TOKENIZER, FIT)
    with pytest.raises(InputError, match="train and validation must share no episode"):
        pretrain_tokenizer(config, tmp_path / "data", tmp_path / "out", resume=False)


def test_nothing_is_recorded_into_a_set_of_other_recordings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Path] = []
    monkeypatch.setattr(stages, "record", lambda directory, *_: asked.append(directory))
    mine = Recording(episodes=2, frames=8, seed=4)
    for directory in ("own", "begun", "none"):
        (tmp_path / directory).mkdir()
    write_recording(tmp_path / "own", "holiday", 8)
    write_recording(tmp_path / "begun", episode_names(2, 4, mine.maps)[0], 8)
    for directory in ("own", "begun", "none"):
        record_set(tmp_path / directory, mine)
    assert asked == [tmp_path / "begun", tmp_path / "none"]
