"""Stepwise rollouts: drawn from what a teacher-forced forward says, to the last bit."""

import dataclasses

import numpy as np
import pytest
import torch
from backends import instruction_set, instruction_sets_and_amx, threads
from cases import SHAPES, make, mixed_prompts, prompt, roll_out, row_ends, schedules
from scipy.stats import chisquare
from testkit import same
from torch import Tensor

from rlir import _library
from rlir.errors import InputError
from rlir.ops import head_logits, sample_tokens
from rlir.rollout.engine import RolloutEngine
from rlir.rollout.parity import trajectory_logprob
from rlir.rollout.sampling import Sampling, greedy
from rlir.rollout.schedule import diagonal, sequential
from rlir.rollout.stepwise import StepwiseEngine, inference_copy
from rlir.rollout.trajectories import NOTHING, Prompt, Trajectories

native = pytest.mark.skipif(_library.PATH is None, reason="the reference is forced")
DTYPES = (torch.bfloat16, torch.float32)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
PLAIN = Sampling(temperature=0.85)
SAMPLINGS = {
    "plain": PLAIN,
    "top-p": Sampling(temperature=0.9, top_p=0.7),
    "all truncations": Sampling(temperature=1.3, top_k=6, top_p=0.95, min_p=0.02),
    "greedy": greedy(),
    "greedy, truncated": Sampling(temperature=0.0, top_k=3),
}


def content(found: Trajectories, rows: slice | Tensor = slice(None)) -> dict[str, Tensor]:
    return {name: x[rows] for name, x in found._tensors().items() if name != "group"}


@native
@dtypes
@row_ends
@pytest.mark.parametrize("shape", SHAPES)
def test_every_bit_is_that_of_scoring(shape: str, row_end: str, dtype: torch.dtype) -> None:
    """Several contexts and lengths in one call, some longer than the model's clips."""
    model = make(shape)
    prompts = mixed_prompts(model)
    for schedule in schedules(model, row_end):
        if shape == "several blocks of keys" and schedule.window not in (None, 2):
            continue
        drawn = roll_out(model, prompts, schedule, dtype, group_size=2)
        scored = trajectory_logprob(model, drawn, dtype)
        assert scored.requires_grad
        assert same(scored.detach(), drawn.logprob), schedule
        assert (drawn.logprob[drawn.drawn] < 0).all() or model.config.codes == 1


@native
@dtypes
@row_ends
@pytest.mark.parametrize("name", SAMPLINGS)
def test_every_bit_under_every_sampling(name: str, row_end: str, dtype: torch.dtype) -> None:
    model, sampling = make("odd"), SAMPLINGS[name]
    for schedule in (sequential(), diagonal(2, row_end)):
        drawn = roll_out(model, mixed_prompts(model), schedule, dtype, sampling=sampling)
        assert same(trajectory_logprob(model, drawn, dtype).detach(), drawn.logprob)
        assert (drawn.support is None) == (not sampling.truncates)
        if drawn.support is not None:
            kept = drawn.support[drawn.drawn]
            assert kept.any(-1).all()
            assert kept.min() != 255, "something is left out"
            assert not drawn.support[~drawn.drawn].any()


@native
@dtypes
@row_ends
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_native_engine_step_by_step(shape: str, row_end: str, dtype: torch.dtype) -> None:
    model = make(shape)
    prompts, engine = mixed_prompts(model), RolloutEngine(model, dtype)
    for schedule in (sequential(), diagonal(1, row_end), diagonal(2, row_end)):
        for sampling in SAMPLINGS.values():
            options = {"group_size": 2, "sampling": sampling, "schedule": schedule, "seed": 3}
            drawn = roll_out(model, prompts, dtype=dtype, **options)
            other = engine.rollout(prompts, **options)
            some = drawn.frames > drawn.context  # of the rest nothing is fed
            assert same(drawn.fed[some], other.fed[some])
            for name, x in content(drawn).items():
                assert name == "fed" or same(x, content(other)[name]), name


@native
@pytest.mark.parametrize("isa", instruction_sets_and_amx())
def test_every_bit_on_every_instruction_set(isa: str) -> None:
    model = make("odd")
    with instruction_set(isa):
        drawn = roll_out(model, [prompt(model, 2, 2)], diagonal(2), torch.bfloat16, group_size=2)
        assert same(trajectory_logprob(model, drawn).detach(), drawn.logprob)


@native
@dtypes
@row_ends
def test_tokens_are_draws_of_their_own_number(row_end: str, dtype: torch.dtype) -> None:
    """From teacher-forced hidden states: (seed, raster position, row id)."""
    model = make("odd")
    a, s = model.action_tokens, model.config.tokens
    for schedule in schedules(model, row_end):
        drawn = roll_out(model, [prompt(model, 2, 4)], schedule, dtype, group_size=3)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            hidden = model.hidden(drawn.codes, drawn.actions, schedule=schedule, context=2)
        for frame in range(2, 5):
            for place in range(s):
                state = hidden[:, frame - 1, place].detach().to(dtype)
                token, _, entropy = sample_tokens(
                    head_logits(state, model.lm_head.weight.to(dtype)),
                    temperature=PLAIN.temperature,
                    seed=3,
                    offset=s + (frame - 1) * (a + s) + a + place,
                    row_ids=drawn.row_ids,
                )
                assert torch.equal(token, drawn.codes[:, frame, place])
                assert torch.equal(entropy, drawn.entropy[:, frame - 1, place])


@row_ends
def test_what_comes_back_is_what_was_fed(row_end: str) -> None:
    model = make("odd")
    a, s, v = model.action_tokens, model.config.tokens, model.config.codes
    prompts = mixed_prompts(model)
    for schedule in schedules(model, row_end):
        plan = schedule.plan(model.config.rows, model.config.columns)
        found = roll_out(model, prompts, schedule, group_size=2)
        assert found.codes.shape == (12, 5, s)
        assert found.fed.shape == (12, plan.slots + 4 * (a + plan.slots))
        assert found.group.tolist() == [i // 2 for i in range(12)]
        assert found.row_ids.tolist() == list(range(12))
        for row in range(12):
            given = prompts[row // 2]
            context, frames = int(found.context[row]), int(found.frames[row])
            assert (context, frames) == (given.context, len(given.actions) + 1)
            assert torch.equal(found.codes[row, :context], given.codes)
            assert torch.equal(found.actions[row, : frames - 1], model.action_ids(given.actions))
            assert int(found.codes[row, :frames].min()) >= 0
            assert int(found.codes[row, :frames].max()) < v
            for x in (found.codes[row, frames:], found.actions[row, frames - 1 :]):
                assert (x == NOTHING).all()
            drawn = found.drawn[row]
            assert (found.step[row, ~drawn] == NOTHING).all()
            for x in (found.logprob, found.entropy):
                assert not x[row, ~drawn].any()
                assert not drawn.any() or x[row, drawn].any()
            expected = torch.full_like(found.fed[row], NOTHING)
            for f in range(frames if drawn.any() else 0):
                start = f * (a + plan.slots)
                if f:
                    expected[start - a : start] = found.actions[row, f - 1] + v
                if f < context:
                    for place in range(s):
                        expected[start + plan.slot_of(place)] = found.codes[row, f, place]
                    continue
                for feed in plan.feeds:
                    source = 0 if feed.stands_in else f
                    expected[start + feed.slot] = found.codes[row, source, feed.place]
                if f + 1 < frames:
                    expected[start + plan.slots - 1] = found.codes[row, f, -1]
                steps = torch.tensor(plan.step_of()) + (f - context) * plan.steps
                assert torch.equal(found.step[row, f - 1].long(), steps)
            assert torch.equal(found.fed[row], expected)


@native
@dtypes
@row_ends
def test_a_rollout_does_not_depend_on_the_others(row_end: str, dtype: torch.dtype) -> None:
    model = make("odd")
    prompts = mixed_prompts(model)
    for schedule in (sequential(), diagonal(2, row_end)):
        whole = roll_out(model, prompts, schedule, dtype, group_size=3)
        chosen = torch.tensor([13, 14, 6])  # of two groups, in another order
        alone = roll_out(
            model, [prompts[4], prompts[4], prompts[2]], schedule, dtype, row_ids=chosen
        )
        for name, x in content(alone).items():
            assert same(x, content(whole, chosen)[name][:, : x.shape[1]] if x.dim() > 1 else x)
        with threads(3):
            again = roll_out(model, prompts, schedule, dtype, group_size=3)
        assert same(content(again), content(whole))


def test_a_window_of_a_row_is_raster_order() -> None:
    model = make("odd")
    prompts = mixed_prompts(model)
    plain = content(roll_out(model, prompts))
    for schedule in (diagonal(5), diagonal(99, "refresh")):
        assert same(content(roll_out(model, prompts, schedule)), plain)
    other = content(roll_out(model, prompts, diagonal(4)))
    assert not same(other["codes"], plain["codes"])


def test_frames_are_a_limit() -> None:
    model = make()
    prompts = mixed_prompts(model)
    whole, some = roll_out(model, prompts), roll_out(model, prompts, frames=2)
    assert some.frames.tolist() == [min(x.context + 2, len(x.actions) + 1) for x in prompts]
    for row in range(len(prompts)):
        frames = int(some.frames[row])
        assert torch.equal(some.codes[row, :frames], whole.codes[row, :frames])
    none = roll_out(model, prompts, frames=0)
    assert not none.drawn.any()
    assert (none.fed == NOTHING).all()
    assert len(roll_out(model, [])) == 0


@pytest.mark.parametrize("temperature", [0.6, 1.0])
def test_codes_are_drawn_as_often_as_they_are_likely(temperature: float) -> None:
    model, n = make(rows=2, columns=3), 6000
    schedule, sampling = diagonal(1), Sampling(temperature)
    drawn = roll_out(model, [prompt(model, 1, 1)], schedule, group_size=n, sampling=sampling)
    with torch.no_grad():
        hidden = model.hidden(drawn.codes, drawn.actions, schedule=schedule)
    likely = (model.lm_head(hidden) / temperature).softmax(-1)[:, 0].double()  # [n, S, V]
    for place in range(6):
        expected = likely[:, place].sum(0)
        expected = (expected / expected.sum() * n).detach().numpy()
        found = np.bincount(drawn.codes[:, 1, place], minlength=model.config.codes)
        assert chisquare(found, expected).pvalue > 1e-4


def test_a_rollout_can_be_trained_on() -> None:
    model = make()
    drawn = roll_out(model, mixed_prompts(model))
    scored = trajectory_logprob(model, drawn, torch.float32)
    ((scored - drawn.logprob).exp() * drawn.logprob).sum().backward()
    assert model.lm_head.weight.grad.abs().sum() > 0


def test_greedy_takes_the_largest_logit() -> None:
    model = make("odd")
    for schedule in (sequential(), diagonal(2)):
        drawn = roll_out(model, [prompt(model, 1, 2)], schedule, sampling=greedy(), group_size=2)
        hidden = model.hidden(drawn.codes, drawn.actions, schedule=schedule).detach()
        logits = head_logits(hidden.flatten(0, 2), model.lm_head.weight)
        assert torch.equal(logits.argmax(-1), drawn.codes[:, 1:].flatten())
        assert same(drawn.codes[0], drawn.codes[1])
        top = dataclasses.replace(PLAIN, top_k=1)
        other = roll_out(model, [prompt(model, 1, 2)], schedule, sampling=top, group_size=2)
        assert torch.equal(other.codes, drawn.codes)
        assert not other.logprob.any()


def test_the_inference_copy_is_rounded_frozen_and_apart() -> None:
    model = make()
    before = model.lm_head.weight.detach().clone()
    policy = inference_copy(model)
    assert not any(p.requires_grad for p in policy.parameters())
    assert torch.equal(policy.lm_head.weight, before.bfloat16())
    assert policy.rotary.dtype == torch.float32, "angles of far positions need their digits"
    with torch.no_grad():
        policy.lm_head.weight.zero_()
    assert torch.equal(model.lm_head.weight, before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"group_size": 0}, "group_size must be >= 1, got 0"),
        ({"frames": -1}, "frames must be at least 0 or None, got -1"),
        ({"seed": -1}, "seed must be from 0 and below 2.63, got -1"),
        ({"seed": 2**63}, "seed must be from 0"),
        ({"row_ids": torch.zeros(3, dtype=torch.int64)}, r"row_ids must be int64 \[1\]"),
        ({"row_ids": torch.zeros(1)}, r"row_ids must be int64 \[1\]"),
        ({"codes": torch.zeros(1, 9, dtype=torch.int64)}, "must have 8 tokens a frame, got 9"),
        ({"codes": torch.full((1, 8), 16)}, "from 0 and below 16, got 16 to 16"),
        ({"codes": torch.full((1, 8), -1)}, "from 0 and below 16"),
        ({"actions": torch.zeros(2, 3, dtype=torch.int64)}, "must be 4 factors of doom"),
        ({"actions": torch.full((2, 4), 9)}, "classes of doom must be from 0"),
    ],
)
def test_input_that_does_not_fit_is_refused(change: dict, message: str) -> None:
    model = make()
    given = dataclasses.asdict(prompt(model, 1, 2))
    given |= {k: change[k] for k in given if k in change}
    options = {k: v for k, v in change.items() if k not in given}
    with pytest.raises(InputError, match=message):
        StepwiseEngine(model).rollout([Prompt(**given)], **{"seed": 0, **options})


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(InputError, match=r"dtype must be bfloat16 or float32, got torch\.float64"):
        StepwiseEngine(make(), torch.float64)
