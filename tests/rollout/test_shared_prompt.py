"""Clips that begin alike: a prompt goes through the model once, with the bits of whole clips."""

import re

import pytest
import torch
from cases import SHAPES, make, prompt, roll_out, row_ends, schedules
from testkit import same
from torch import Tensor

from rlir import _library
from rlir.errors import InputError
from rlir.models import shared_prompt
from rlir.models.shared_prompt import group_hidden
from rlir.models.world_model import WorldModel
from rlir.rollout.parity import group_logprob, token_logprob, trajectory_logprob
from rlir.rollout.schedule import Schedule, diagonal, sequential
from rlir.rollout.trajectories import Trajectories

native = pytest.mark.skipif(_library.PATH is None, reason="the bits are the native kernels'")


def drawn_groups(
    model: WorldModel, schedule: Schedule, context: int, frames: int
) -> tuple[Trajectories, list[int]]:
    """Two groups of three, of which the second lost a member."""
    prompts = [prompt(model, context, context + frames - 1, seed=i) for i in range(2)]
    drawn = roll_out(model, prompts, schedule, group_size=3)
    return drawn.rows(torch.tensor([0, 1, 2, 3, 5])), [3, 2]


@native
@row_ends
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_states_have_the_bits_of_whole_clips(shape: str, dtype: torch.dtype, row_end: str) -> None:
    model = make(shape)
    for schedule in schedules(model, row_end):
        for context, frames in ((1, 2), (2, 1), (2, model.config.frames)):
            drawn, sizes = drawn_groups(model, schedule, context, frames)
            clips = (drawn.codes, drawn.actions)
            options = {"schedule": schedule, "context": context}
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                whole = model.hidden(*clips, **options)[:, context - 1 :]
                for split in (sizes, [1, 2, 2]):
                    assert same(group_hidden(model, *clips, split, **options), whole)


@native
@row_ends
def test_the_trainer_scores_whole_clips_bits(row_end: str) -> None:
    model = make("odd")
    for schedule in (sequential(), diagonal(2, row_end)):
        drawn, sizes = drawn_groups(model, schedule, 1, 2)
        clips = (drawn.codes, drawn.actions)
        for dtype in (torch.float32, torch.bfloat16):
            shared = group_logprob(model, *clips, sizes, 0.85, dtype, schedule=schedule)
            assert same(shared, token_logprob(model, *clips, 0.85, dtype, schedule=schedule))


def gradients(model: WorldModel, hidden: Tensor) -> dict[str, Tensor]:
    weight = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0))
    model.zero_grad()
    (hidden * weight.to(hidden.dtype)).sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@row_ends
@pytest.mark.parametrize("windowed", [False, True])
def test_gradients_are_those_of_whole_clips(row_end: str, windowed: bool) -> None:
    model = make("odd")
    wide = WorldModel(model.config).double()
    wide.load_state_dict(model.state_dict())
    wide.rotary = wide.rotary.double()
    frames = model.config.frames if windowed else model.config.frames - 2
    for schedule in (sequential(), diagonal(1, row_end), diagonal(3, row_end)):
        drawn, sizes = drawn_groups(model, schedule, 2, frames)
        clips = (drawn.codes, drawn.actions)
        options = {"schedule": schedule, "context": 2}
        exact = gradients(wide, wide.hidden(*clips, **options)[:, 1:])
        for split in (sizes, [1] * 5):
            shared = gradients(wide, group_hidden(wide, *clips, split, **options))
            torch.testing.assert_close(shared, exact, rtol=1e-9, atol=1e-9)
            found = gradients(model, group_hidden(model, *clips, split, **options))
            assert found.keys() == exact.keys()
            for name, gradient in found.items():
                error = (gradient - exact[name]).abs().max()
                assert error <= 1e-4 * exact[name].abs().max(), name


def test_a_prompt_goes_through_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("odd")
    drawn = roll_out(model, [prompt(model, 2, 3, seed=i) for i in range(2)], group_size=4)
    seen: list[int] = []
    real = shared_prompt.WorldModel.embed_at

    def counted(self: WorldModel, ids: Tensor, slots: Tensor) -> Tensor:
        seen.append(ids.numel())
        return real(self, ids, slots)

    monkeypatch.setattr(WorldModel, "embed_at", counted)
    trajectory_logprob(model, drawn)
    block = model.config.block
    own = 2 * block - model.action_tokens - 1  # of a rollout: two frames but the last token
    assert seen == [2 * 2 * block + 8 * own]


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"sizes": [2, 2]}, "group_hidden: sizes must be at least 1 and 3 together, got [2, 2]"),
        ({"sizes": [3, 0]}, "group_hidden: sizes must be at least 1 and 3 together, got [3, 0]"),
        ({"context": 3}, "group_hidden: context must be from 1 to 2, got 3"),
        ({"context": 0}, "group_hidden: context must be from 1 to 2, got 0"),
        ({"code": 1}, "group_hidden: clips of a group must share 1 frames"),
        ({"action": 1}, "group_hidden: clips of a group must share 1 action blocks"),
    ],
)
def test_what_is_no_group(change: dict, line: str) -> None:
    model = make()
    codes = torch.zeros(3, 3, model.config.tokens, dtype=torch.int64)
    actions = torch.zeros(3, 2, model.action_tokens, dtype=torch.int64)
    codes[1, 0, 2], actions[2, 0, 0] = change.pop("code", 0), change.pop("action", 0)
    with pytest.raises(InputError, match=re.escape(line)):
        group_hidden(model, codes, actions, **{"sizes": [3], **change})
