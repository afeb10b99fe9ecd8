"""A good checkpoint stays good whatever happens to the next; a fingerprint is the weights alone."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from testkit import DAMAGES, IDMS, TOKENIZER, WORLD_MODEL, damage, examples, one_line, same, stirred

from rlir.checkpoints import (
    WEIGHTS,
    fingerprint,
    free_bytes,
    load_state,
    load_weights,
    read_json,
    save_model,
    save_state,
    write_bytes,
    write_json,
    write_parts,
)
from rlir.errors import InputError
from rlir.models.idm import InverseDynamics
from rlir.models.tokenizer import Tokenizer
from rlir.models.world_model import WorldModel

FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("broken", ["replace", "fsync"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"old": 1})

    def fail(*_: object) -> None:
        raise FULL

    with monkeypatch.context() as patch:
        patch.setattr(os, broken, fail)
        with pytest.raises(OSError, match="No space"):
            write_json(path, {"new": 2})
    assert read_json(path) == {"old": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    write_json(path, {"new": 2})
    assert read_json(path) == {"new": 2}


def test_a_model_that_cannot_be_written_leaves_the_old_weights(
    tmp_path: Path, world_model: WorldModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(tmp_path, world_model, "world-model", WORLD_MODEL)
    before = (tmp_path / WEIGHTS).read_bytes()

    def fail(*_: object) -> None:
        raise FULL

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="No space"):
            save_model(tmp_path, stirred(world_model), "world-model", WORLD_MODEL)
    assert (tmp_path / WEIGHTS).read_bytes() == before
    again = WorldModel(WORLD_MODEL)
    load_weights(tmp_path, again)


def test_parts_that_cannot_be_made_leave_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a"

    def parts(broken: bool) -> Iterator[bytes]:
        yield b"one, "
        if broken:
            raise MemoryError
        yield b"two"

    write_parts(path, parts(broken=False))
    with pytest.raises(MemoryError):
        write_parts(path, parts(broken=True))
    assert path.read_bytes() == b"one, two"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("channels_last", [False, True])
def test_weights_come_back_bit_for_bit(tmp_path: Path, channels_last: bool) -> None:
    model = Tokenizer(TOKENIZER)
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    save_model(tmp_path, model, "tokenizer", TOKENIZER)
    again = Tokenizer(TOKENIZER)
    load_weights(tmp_path, again)
    assert same(again.state_dict(), model.state_dict())
    assert fingerprint(again) == fingerprint(model)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=examples(10))
@given(seed=st.integers(0, 2**31), kind=st.sampled_from(["tokenizer", "world-model", *IDMS]))
def test_a_fingerprint_is_the_same_for_every_dtype(tmp_path: Path, seed: int, kind: str) -> None:
    torch.manual_seed(seed)
    if kind in IDMS:
        config, make = IDMS[kind], InverseDynamics
    else:
        config = TOKENIZER if kind == "tokenizer" else WORLD_MODEL
        make = Tokenizer if kind == "tokenizer" else WorldModel
    model = make(config)
    rounded = make(config)
    rounded.load_state_dict(
        {
            k: v.bfloat16().float() if v.is_floating_point() else v
            for k, v in model.state_dict().items()
        }
    )
    assert fingerprint(rounded) == fingerprint(model) == fingerprint(model.bfloat16())
    save_model(tmp_path, rounded, kind, config, dtype=torch.bfloat16)
    loaded = make(config)
    load_weights(tmp_path, loaded)
    assert fingerprint(loaded) == fingerprint(rounded)
    assert same(loaded.state_dict(), rounded.state_dict())


def test_a_fingerprint_tells_weights_apart(world_model: WorldModel) -> None:
    before = fingerprint(world_model)
    assert len(before) == 12
    for name, parameter in world_model.named_parameters():
        value = parameter.data.flatten()[0].clone()
        parameter.data.flatten()[0] = value + 1
        assert fingerprint(world_model) != before, name
        parameter.data.flatten()[0] = value
    assert fingerprint(world_model) == before


STATE = {
    "step": 3,
    "seconds": {"rollout": 0.5},
    "curves": [{"step": 1, "reward": 0.25}],
    "model": {"w": torch.arange(6.0).view(2, 3)},
}


def test_a_state_comes_back_as_it_was(tmp_path: Path) -> None:
    save_state(tmp_path / "new" / "state.pt", STATE)
    assert same(load_state(tmp_path / "new" / "state.pt"), STATE)


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_state_that_cannot_be_read_is_named(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "state.pt"
    save_state(path, STATE)
    damage(path, kind)
    with pytest.raises(InputError) as caught:
        load_state(path)
    assert f"resume: {path} must be a readable state" in one_line(str(caught.value))


class Hostile:
    def __reduce__(self) -> tuple:
        return (print, ("code of a state file was run",))


def test_a_state_holds_no_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"model": Hostile()}, tmp_path / "state.pt")
    with pytest.raises(InputError, match="must be a readable state"):
        load_state(tmp_path / "state.pt")
    assert "was run" not in capsys.readouterr().out


@pytest.mark.parametrize("text", ["", "{", b"\xff\xfe"])
def test_json_that_cannot_be_read_is_named(tmp_path: Path, text: str | bytes) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(InputError) as caught:
        read_json(path)
    assert str(path) in one_line(str(caught.value))


@given(st.binary(max_size=200))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=examples(20))
def test_bytes_come_back(tmp_path: Path, data: bytes) -> None:
    write_bytes(tmp_path / "b", data)
    assert (tmp_path / "b").read_bytes() == data


def test_free_space_is_that_of_the_nearest_folder_that_exists(tmp_path: Path) -> None:
    assert free_bytes(tmp_path / "not" / "there" / "yet") > 0
