"""Training resumes exactly, stops cleanly at Ctrl-C and at a NaN, and leaves others' folders."""

import itertools
import math
import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from testkit import WORLD_MODEL, command, environment, one_line, rlir, same
from torch import Tensor, nn

from rlir.checkpoints import load_state, read_json, write_json
from rlir.errors import InputError, TrainingError
from rlir.models.world_model import WorldModel
from rlir.training import (
    STATE,
    FitConfig,
    InterruptedRun,
    fit,
    interruptible,
    learning_rate,
    make_muon,
    make_optimizer,
    prepare_output,
    step_generator,
)

CONFIG = FitConfig(
    steps=9, batch=8, learning_rate=1e-2, warmup=3, evaluate_every=4, checkpoint_every=2
)


class Toy:
    """A regression with a running mean, as the judge has."""

    def __init__(self, seed: int = 0, at: dict[int, Callable[[Tensor], Tensor]] | None = None):
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))
        self.at, self.calls = at or {}, 0

    def loss(self, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        x = torch.randn(8, 4, generator=generator)
        truth = x.sum(1, keepdim=True)
        change = self.at.get(self.calls, lambda y: y)
        self.calls += 1
        return (self.model(change(x)) - truth).square().mean(), {}

    def evaluate(self) -> dict[str, float]:
        x = torch.ones(2, 4)
        with torch.no_grad():
            return {"error": float((self.model(x) - 4).abs().mean())}


class Layered(Toy):
    """The same within ``layers``, where Muon looks for matrices between hidden states."""

    def __init__(self) -> None:
        super().__init__()
        model = self.model
        self.model = nn.Module()
        self.model.layers = model  # type: ignore[assignment]
        self.model.forward = model.forward  # type: ignore[method-assign]


def test_muon_has_the_matrices_of_the_layers_and_adamw_the_rest() -> None:
    model = WorldModel(WORLD_MODEL)
    muon, adamw = make_muon(model, 1e-3, 0.1, 0.95).parts
    assert isinstance(muon, torch.optim.Muon)
    sizes = [sum(len(g["params"]) for g in part.param_groups) for part in (muon, adamw)]
    assert sizes[0] == 4 * WORLD_MODEL.layers, "qkv, o, gate and up, down"
    assert sum(sizes) == len(list(model.parameters()))


def test_the_seed_changes_the_order_of_the_data(tmp_path: Path) -> None:
    seen = []
    for seed in (0, 1):
        inputs: list[Tensor] = []

        def note(x: Tensor, inputs: list[Tensor] = inputs) -> Tensor:
            inputs.append(x.clone())
            return x

        task = Toy(at=dict.fromkeys(range(2), note))
        config = replace(CONFIG, steps=2, seed=seed)
        fit(task, config, tmp_path / str(seed), resumed=False)
        seen.append(inputs)
    assert all(not torch.equal(a, b) for a, b in zip(*seen, strict=True))


def state_of(out: Path) -> dict:
    """A saved state without what time it took."""
    state = load_state(out / STATE)
    state.pop("seconds")
    state["history"] = [
        {k: v for k, v in row.items() if k != "seconds"} for row in state["history"]
    ]
    return state


def test_training_lowers_the_loss(tmp_path: Path) -> None:
    config = FitConfig(steps=80, batch=8, learning_rate=1e-2, warmup=3, evaluate_every=40)
    history = fit(task := Toy(), config, tmp_path, resumed=False)
    assert [row["step"] for row in history] == [40, 80]
    assert history[-1]["loss"] < history[0]["loss"]
    assert not task.model.training


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("parts", [[1], [4], [3, 2], [2, 2, 2, 2]])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    tmp_path: Path, parts: list[int], optimizer: Literal["adamw", "muon"]
) -> None:
    """Weights, running means, optimizer, history."""
    config = replace(CONFIG, optimizer=optimizer)
    toy = Toy if optimizer == "adamw" else Layered
    fit(toy(), config, tmp_path / "whole", resumed=False)
    for i, part in enumerate(parts):
        fit(toy(), config, tmp_path / "parts", resumed=i > 0, stop_after=part)
    torch.manual_seed(9)
    fit(toy(), config, tmp_path / "parts", resumed=True)
    assert same(state_of(tmp_path / "parts"), state_of(tmp_path / "whole"))
    assert [row["step"] for row in state_of(tmp_path / "parts")["history"]] == [4, 8, 9]


def test_going_on_with_a_finished_run_changes_nothing(tmp_path: Path) -> None:
    first = fit(Toy(), CONFIG, tmp_path, resumed=False)
    before = (tmp_path / STATE).read_bytes()
    task = Toy()
    assert fit(task, CONFIG, tmp_path, resumed=True) == first
    assert task.calls == 0
    assert (tmp_path / STATE).read_bytes() == before


# -- not a number ------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_what_is_no_number_stops_with_the_state_of_before_the_step(
    tmp_path: Path, what: str
) -> None:
    fit(Toy(), CONFIG, tmp_path / "whole", resumed=False)
    if what == "loss":
        task = Toy(at={5: lambda x: x * torch.nan})
    else:
        task = Toy()
        weight = task.model[0].weight
        weight.register_hook(lambda g: g * (torch.nan if task.calls == 6 else 1))
    with pytest.raises(TrainingError) as caught:
        fit(task, CONFIG, tmp_path / "bad", resumed=False)
    assert "step 5: loss and gradient must be finite" in one_line(str(caught.value))
    saved = state_of(tmp_path / "bad")
    assert saved["step"] == 5
    for name, value in saved["model"].items():
        assert value.isfinite().all(), name
    fit(Toy(), CONFIG, tmp_path / "bad", resumed=True)
    assert same(state_of(tmp_path / "bad"), state_of(tmp_path / "whole"))


# -- Ctrl-C ------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_after_the_step_and_its_save(tmp_path: Path, number: int) -> None:
    def press(x: Tensor) -> Tensor:
        os.kill(os.getpid(), number)
        return x

    handler = signal.getsignal(number)
    fit(Toy(), CONFIG, tmp_path / "whole", resumed=False)
    with pytest.raises(InterruptedRun):
        fit(Toy(at={4: press}), CONFIG, tmp_path / "part", resumed=False)
    assert signal.getsignal(number) is handler
    assert state_of(tmp_path / "part")["step"] == 5, "not a step at which a save was due"
    fit(Toy(), CONFIG, tmp_path / "part", resumed=True)
    assert same(state_of(tmp_path / "part"), state_of(tmp_path / "whole"))


def test_a_second_ctrl_c_ends_at_once(tmp_path: Path) -> None:
    def press_twice(x: Tensor) -> Tensor:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        return x

    with pytest.raises(KeyboardInterrupt):
        fit(Toy(at={4: press_twice}), CONFIG, tmp_path, resumed=False)
    assert state_of(tmp_path)["step"] == 4, "the last save that was due"


def test_without_a_signal_nothing_was_asked() -> None:
    with interruptible() as asked:
        assert not asked()


@pytest.mark.slow
def test_ctrl_c_leaves_130_and_a_state_to_go_on_with(smoke_base: Path, tmp_path: Path) -> None:
    out = tmp_path / "tokenizer"
    words = ["pretrain", "tokenizer", "--preset", "doom-smoke", "--out", out, "--threads", 1]
    words += ["--data", smoke_base / "data", "--fit.steps", 150, "--fit.evaluate-every", 150]
    child = subprocess.Popen(command(*words), env=environment(), stderr=subprocess.PIPE, text=True)
    while not (out / STATE).exists():
        assert child.poll() is None, child.stderr.read()
        time.sleep(0.01)
    child.send_signal(signal.SIGINT)
    text = child.communicate(timeout=120)[1]
    assert child.returncode == 130, text
    assert text.splitlines()[-1].startswith("rlir pretrain: interrupted; ")
    assert "Traceback" not in text
    step = load_state(out / STATE)["step"]
    assert 0 < step < 150
    assert not (out / "model.safetensors").exists()

    refused = rlir(*words)
    assert refused.returncode == 2
    assert "must be empty or come with --resume" in one_line(refused.stderr)
    done = rlir(*words, "--resume")
    assert done.returncode == 0, done.stderr
    assert load_state(out / STATE)["step"] == 150
    assert (out / "model.safetensors").exists()


# -- folders -----------------------------------------------------------------------------------


IDENTITY = {"kind": "idm", "seed": 1, "fit": {"steps": 5}}


def test_a_folder_is_claimed_once(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "run"
    assert prepare_output(out, IDENTITY, resume=False) is False
    assert read_json(out / "run.json") == IDENTITY
    with pytest.raises(InputError, match="must be empty or come with --resume"):
        prepare_output(out, IDENTITY, resume=False)
    assert prepare_output(out, IDENTITY, resume=True) is True


def test_going_on_with_nothing_begins(tmp_path: Path) -> None:
    assert prepare_output(tmp_path / "run", IDENTITY, resume=True) is False
    assert prepare_output(tmp_path / "run", IDENTITY, resume=True) is True


@pytest.mark.parametrize("resume", [False, True])
def test_foreign_files_are_left_alone(tmp_path: Path, resume: bool) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(InputError, match="it holds other files"):
        prepare_output(tmp_path, IDENTITY, resume)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("resume", [False, True])
def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path: Path, resume: bool) -> None:
    (tmp_path / "run").touch()
    with pytest.raises(InputError, match="must be a folder, it is a file"):
        prepare_output(tmp_path / "run", IDENTITY, resume)


def test_other_settings_are_named(tmp_path: Path) -> None:
    prepare_output(tmp_path / "run", IDENTITY, resume=False)
    other = {"kind": "idm", "seed": 2, "fit": {"steps": 6}, "more": 1}
    with pytest.raises(InputError, match="must be of the same settings, got other fit, more, seed"):
        prepare_output(tmp_path / "run", other, resume=True)
    assert read_json(tmp_path / "run" / "run.json") == IDENTITY


def test_a_claim_that_was_killed_half_way_can_be_made_again(tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / ".run.json.partial").write_text('{"kin')
    assert prepare_output(out, IDENTITY, resume=False) is False
    assert read_json(out / "run.json") == IDENTITY


def test_a_broken_claim_is_named(tmp_path: Path) -> None:
    write_json(tmp_path / "run.json", IDENTITY)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(InputError, match=r"run\.json: must be readable JSON"):
        prepare_output(tmp_path, IDENTITY, resume=True)


# -- schedules, optimizer, seeds ---------------------------------------------------------------


@given(st.integers(0, 50), st.integers(1, 200), st.floats(0, 1))
def test_the_learning_rate_warms_up_and_falls_to_its_final_fraction(
    warmup: int, steps: int, final: float
) -> None:
    config = FitConfig(steps=steps, learning_rate=2.0, warmup=warmup, final_fraction=final)
    rates = [learning_rate(config, step) for step in range(steps)]
    cosine = [
        2.0 * (final + (1 - final) * (1 + math.cos(math.pi * step / steps)) / 2)
        for step in range(steps)
    ]
    for step, rate in enumerate(rates):
        share = min(1.0, (step + 1) / max(1, warmup))
        assert rate == pytest.approx(share * cosine[step])
    after = rates[warmup:]
    assert all(a >= b for a, b in itertools.pairwise(after))
    assert learning_rate(config, steps) >= 2.0 * final * min(1.0, steps / max(1, warmup)) - 1e-9


def test_matrices_alone_decay() -> None:
    model = Toy().model
    model[3].requires_grad_(False)
    decayed, plain = make_optimizer(model, 0.1, 0.5, 0.9).param_groups
    assert [p.dim() for p in decayed["params"]] == [2]
    assert {p.dim() for p in plain["params"]} == {1}
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.5, 0.0)
    assert sum(len(g["params"]) for g in (decayed, plain)) == 4, "frozen weights take no part"


def test_steps_and_seeds_have_draws_of_their_own() -> None:
    """Torch's CPU generator keeps 32 bits of a seed alone."""
    seeds = (0, 1, 2, 3, 1000, 2**31 - 1)
    draws = {
        (seed, step): tuple(torch.rand(3, generator=step_generator(seed, step)).tolist())
        for seed in seeds
        for step in range(40)
    }
    assert len(set(draws.values())) == len(draws)
    again = torch.rand(3, generator=step_generator(3, 7))
    assert tuple(again.tolist()) == draws[3, 7]


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0},
        {"batch": 0},
        {"evaluate_every": 0},
        {"checkpoint_every": -1},
        {"learning_rate": 0.0},
        {"learning_rate": float("nan")},
        {"seed": -1},
        {"seed": 2**31},
    ],
)
def test_settings_without_sense_are_refused(wrong: dict) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        FitConfig(**wrong)
