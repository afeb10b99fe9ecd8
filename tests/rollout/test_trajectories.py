"""Trajectories survive a file, and a file that is none is refused."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from cases import make, mixed_prompts, prompt
from safetensors.torch import save, save_file
from testkit import same

from rlir.errors import InputError
from rlir.rollout.sampling import Sampling
from rlir.rollout.schedule import diagonal
from rlir.rollout.stepwise import StepwiseEngine
from rlir.rollout.trajectories import NOTHING, Prompt, Trajectories, prompts_of


@pytest.fixture(params=[None, 0.8])
def drawn(request: pytest.FixtureRequest) -> Trajectories:
    """With and without a support."""
    model = make()
    return StepwiseEngine(model).rollout(
        mixed_prompts(model),
        group_size=2,
        schedule=diagonal(2),
        sampling=Sampling(temperature=0.9, top_p=request.param),
        seed=5,
    )


def everything(x: Trajectories) -> dict:
    return {f.name: getattr(x, f.name) for f in dataclasses.fields(x)}


def test_they_survive_a_file(drawn: Trajectories, tmp_path: Path) -> None:
    other = dataclasses.replace(drawn, same_policy=False, timings={"rollout": 1.5})
    for x in (drawn, other, drawn.rows(torch.tensor([5, 0]))):
        x.save(tmp_path / "x.safetensors")
        assert same(everything(Trajectories.load(tmp_path / "x.safetensors")), everything(x))


def test_rows_are_some_of_the_rollouts(drawn: Trajectories) -> None:
    rows = torch.tensor([7, 2, 2])
    some = drawn.rows(rows)
    assert len(some) == 3
    assert (some.seed, some.schedule, some.sampling) == (5, drawn.schedule, drawn.sampling)
    for name, x in everything(some).items():
        if isinstance(x, torch.Tensor):
            assert same(x, getattr(drawn, name)[rows])
    assert same(some.drawn, drawn.drawn[rows])


def test_drawn_is_neither_given_nor_beyond_the_end(drawn: Trajectories) -> None:
    assert drawn.drawn.shape == drawn.step.shape[:2]
    for row in range(len(drawn)):
        context, frames = int(drawn.context[row]), int(drawn.frames[row])
        expected = [context <= frame < frames for frame in range(1, drawn.codes.shape[1])]
        assert drawn.drawn[row].tolist() == expected
    assert torch.equal(drawn.drawn, (drawn.step != NOTHING).all(-1))
    assert drawn.drawn.any(1).tolist() == [i // 2 not in (3,) for i in range(12)]


WRONG_TENSORS = {
    "dtype": {"codes": lambda x: x.int()},
    "dimensions": {"codes": lambda x: x[0]},
    "rows": {"logprob": lambda x: x[1:]},
    "frames": {"step": lambda x: x[:, 1:]},
    "none": {"fed": lambda x: None},
    "context": {"context": lambda x: x + 99},
    "length": {"frames": lambda x: x + 99},
    "no context": {"context": lambda x: x * 0},
    "unknown": {"codes2": lambda x: torch.zeros(3)},
}
WRONG_WORDS = {
    "no seed": {"seed": None},
    "schedule": {"schedule": {"window": 0, "row_end": "prompt"}},
    "row end": {"schedule": {"window": 1, "row_end": ["prompt"]}},
    "schedule's kind": {"schedule": 3},
    "unknown option": {"sampling": {"temperature": 1.0, "evil": 1}},
    "temperature": {"sampling": {"temperature": float("nan")}},
}


def about(x: Trajectories) -> dict:
    return {
        "seed": x.seed,
        "schedule": dataclasses.asdict(x.schedule),
        "sampling": dataclasses.asdict(x.sampling),
        "same_policy": x.same_policy,
        "timings": x.timings,
    }


@pytest.mark.parametrize("wrong", WRONG_TENSORS)
def test_tensors_that_do_not_fit_are_refused(
    wrong: str, drawn: Trajectories, tmp_path: Path
) -> None:
    tensors = dict(drawn._tensors())
    for name, change in WRONG_TENSORS[wrong].items():
        changed = change(tensors.get(name))
        tensors = {k: x.contiguous() for k, x in tensors.items() if k != name}
        tensors |= {} if changed is None else {name: changed.contiguous()}
    save_file(tensors, tmp_path / "x", {"trajectories": json.dumps(about(drawn))})
    with pytest.raises(InputError, match=r"x: must be saved trajectories, got .+"):
        Trajectories.load(tmp_path / "x")


@pytest.mark.parametrize("wrong", WRONG_WORDS)
def test_words_that_do_not_fit_are_refused(wrong: str, drawn: Trajectories, tmp_path: Path) -> None:
    words = {"trajectories": json.dumps({**about(drawn), **WRONG_WORDS[wrong]})}
    save_file({k: x.contiguous() for k, x in drawn._tensors().items()}, tmp_path / "x", words)
    with pytest.raises(InputError, match="must be saved trajectories, got "):
        Trajectories.load(tmp_path / "x")


@pytest.mark.parametrize("words", [{}, {"trajectories": "[" * 10**5}, {"trajectories": "3"}])
def test_other_safetensors_are_refused(words: dict, drawn: Trajectories, tmp_path: Path) -> None:
    save_file({k: x.contiguous() for k, x in drawn._tensors().items()}, tmp_path / "x", words)
    with pytest.raises(InputError, match="must be saved trajectories, got "):
        Trajectories.load(tmp_path / "x")


def test_other_files_are_refused(drawn: Trajectories, tmp_path: Path) -> None:
    drawn.save(tmp_path / "whole")
    whole = (tmp_path / "whole").read_bytes()
    parts = (b"", b"PK\x03\x04", whole[:7], whole[:200], whole[:-1], b"\xff" * 8 + whole[8:])
    for content in (*parts, save({"x": torch.zeros(1)})):
        (tmp_path / "x").write_bytes(content)
        with pytest.raises(InputError, match="must be saved trajectories, got "):
            Trajectories.load(tmp_path / "x")
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(InputError, match="must be saved trajectories, got "):
            Trajectories.load(path)


def test_prompts_are_checked() -> None:
    codes, actions = torch.zeros(2, 8, dtype=torch.int64), torch.zeros(3, 4, dtype=torch.int64)
    assert Prompt(codes, actions).context == 2
    with pytest.raises(InputError, match="codes must be int64 of 2 dimensions on the CPU"):
        Prompt(codes[0], actions)
    with pytest.raises(InputError, match="actions must be int64 of 2 dimensions on the CPU"):
        Prompt(codes, actions.float())
    for few in (codes[:0], codes.repeat(3, 1)):
        with pytest.raises(InputError, match="at least 1 frame and an action for each frame"):
            Prompt(few, actions)


def test_prompts_of_a_batch() -> None:
    given = [prompt(make(), 1, 3, seed=i) for i in range(2)]
    actions = torch.stack([x.actions for x in given])
    for codes in (torch.cat([x.codes for x in given]), torch.stack([x.codes for x in given])):
        for made, x in zip(prompts_of(codes, actions), given, strict=True):
            assert same([made.codes, made.actions], [x.codes, x.actions])
    with pytest.raises(InputError, match="each have an action sequence, got 2 and 1"):
        prompts_of(codes, actions[:1])
