"""Checkpoints that do not fit, or do not fit together, are named in one line."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from testkit import IDMS, TOKENIZER, WORLD_MODEL, one_line, same, stirred

from rlir.checkpoints import CONFIG, WEIGHTS, fingerprint, save_model
from rlir.errors import InputError
from rlir.models.idm import InverseDynamics, InverseDynamicsConfig
from rlir.models.load import load_idm, load_models, load_tokenizer, load_world_model
from rlir.models.tokenizer import Tokenizer, TokenizerConfig
from rlir.models.world_model import WorldModel


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A base, a reward IDM and a judge that belong together."""
    torch.manual_seed(0)
    tokenizer = Tokenizer(TOKENIZER)
    save_model(tmp_path / "tokenizer", tokenizer, "tokenizer", TOKENIZER)
    info = {"tokenizer": fingerprint(tokenizer)}
    world = stirred(WorldModel(WORLD_MODEL))
    save_model(tmp_path / "world-model", world, "world-model", WORLD_MODEL, info=info)
    for name, config in zip(("idm", "judge"), IDMS.values(), strict=True):
        save_model(tmp_path / name, InverseDynamics(config), "idm", config)
    return tmp_path


def load_all(saved: Path) -> None:
    load_models(saved, saved / "idm", saved / "judge")


def refused(saved: Path) -> str:
    with pytest.raises(InputError) as caught:
        load_all(saved)
    return one_line(str(caught.value))


def test_what_was_saved_is_loaded_frozen_and_in_eval_mode(saved: Path) -> None:
    models = load_models(saved, saved / "idm", saved / "judge")
    for model in (models.tokenizer, models.world_model, models.reward_idm, models.judge_idm):
        assert not model.training
        assert not any(p.requires_grad for p in model.parameters())
    assert models.world_model.config == WORLD_MODEL
    assert models.tokenizer.config == TOKENIZER
    torch.manual_seed(0)
    assert same(models.tokenizer.state_dict(), Tokenizer(TOKENIZER).state_dict())


@pytest.mark.parametrize("load", [load_tokenizer, load_world_model, load_idm])
def test_a_checkpoint_of_another_kind_is_refused(saved: Path, load: Callable) -> None:
    kinds = {"tokenizer": load_tokenizer, "world-model": load_world_model, "idm": load_idm}
    for kind, right in kinds.items():
        if load is right:
            load(saved / kind)
            continue
        with pytest.raises(InputError, match=f"must be a .*, got '{kind}'") as caught:
            load(saved / kind)
        assert str(saved / kind) in one_line(str(caught.value))


NAMES = ["tokenizer", "world-model", "idm", "judge"]


@pytest.mark.parametrize("file", [CONFIG, WEIGHTS])
@pytest.mark.parametrize("name", NAMES)
def test_a_missing_file_is_named(saved: Path, name: str, file: str) -> None:
    (saved / name / file).unlink()
    assert str(saved / name) in (text := refused(saved))
    assert file in text


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("share", [0, 0.001, 0.5, 0.999])
def test_truncated_weights_are_named(saved: Path, name: str, share: float) -> None:
    path = saved / name / WEIGHTS
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    assert f"{path} must be readable" in refused(saved)


def edit(path: Path, change: Callable[[dict], object]) -> None:
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("tokenizer", lambda c: c.pop("model")),
        ("tokenizer", lambda c: c.update(model=[])),
        ("tokenizer", lambda c: c["model"].pop("levels")),  # then the default, of another shape
        ("tokenizer", lambda c: c["model"].update(channels=16)),
        ("tokenizer", lambda c: c["model"].update(patch="wide")),
        ("tokenizer", lambda c: c["model"].update(height=15)),
        ("world-model", lambda c: c["model"].update(surprise=1)),
        ("world-model", lambda c: c["model"].update(hidden="many")),
        ("world-model", lambda c: c["model"].update(layers=3)),
        ("world-model", lambda c: c["model"].update(layers=1)),
        ("world-model", lambda c: c["model"].update(space="quake")),
        ("idm", lambda c: c["model"].update(architecture="other")),
        ("idm", lambda c: c["model"].update(architecture="fixed")),
        ("judge", lambda c: c["model"].update(hidden=20)),
    ],
)
def test_a_config_that_does_not_fit_the_weights_is_named(
    saved: Path, name: str, change: Callable[[dict], object]
) -> None:
    edit(saved / name / CONFIG, change)
    assert str(saved / name) in refused(saved)


@pytest.mark.parametrize("text", ["", "{", "[]", "null"])
def test_a_config_that_is_none_is_named(saved: Path, text: str) -> None:
    (saved / "idm" / CONFIG).write_text(text)
    assert str(saved / "idm") in refused(saved)


def test_a_world_model_of_another_tokenizer_is_refused(saved: Path) -> None:
    other = Tokenizer(TOKENIZER)
    save_model(saved / "tokenizer", other, "tokenizer", TOKENIZER)
    text = refused(saved)
    assert "must come with the tokenizer" in text
    assert fingerprint(other) in text


def test_a_tokenizer_of_another_grid_is_refused(saved: Path) -> None:
    config = TokenizerConfig(height=24, width=48, levels=(4, 4), channels=8, blocks=1)
    save_model(saved / "tokenizer", Tokenizer(config), "tokenizer", config)
    assert "must fit the tokenizer's grid and codes (3, 4, 16), got (2, 4, 16)" in refused(saved)


def test_a_world_model_that_names_no_tokenizer_goes_by_its_grid(saved: Path) -> None:
    edit(saved / "world-model" / CONFIG, lambda c: c.pop("info"))
    save_model(saved / "tokenizer", Tokenizer(TOKENIZER), "tokenizer", TOKENIZER)
    load_all(saved)


def test_the_judge_must_not_be_the_reward_idm(saved: Path) -> None:
    with pytest.raises(InputError, match="judge: must be another model than the reward IDM"):
        load_models(saved, saved / "idm", saved / "idm")


def test_the_judge_must_not_be_a_rounded_copy_of_the_reward_idm(saved: Path) -> None:
    idm = load_idm(saved / "idm")
    save_model(saved / "judge", idm, "idm", idm.config, dtype=torch.bfloat16)
    assert "judge: must be another model" in refused(saved)


def test_models_of_other_frame_sizes_are_refused(saved: Path) -> None:
    config = InverseDynamicsConfig(height=24, width=48, channels=8, hidden=10)
    save_model(saved / "judge", InverseDynamics(config), "idm", config)
    assert "frames must have one size, got [(16, 48), (24, 48)]" in refused(saved)
