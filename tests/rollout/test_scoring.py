"""Trajectories are scored under what their tokens had seen when they were drawn."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from cases import make, mixed_prompts, prompt, roll_out, row_ends, schedules
from testkit import same
from torch import Tensor

from rlir.models import world_model
from rlir.models.world_model import WorldModel, rotary_table
from rlir.rollout.layout import layout_of
from rlir.rollout.parity import token_logprob, trajectory_logprob
from rlir.rollout.sampling import Sampling
from rlir.rollout.schedule import diagonal, sequential
from rlir.rollout.trajectories import Trajectories


def plain_hidden(
    model: WorldModel, drawn: Trajectories, context: int, monkeypatch: pytest.MonkeyPatch
) -> Tensor:
    """float64, under a dense mask of what had been fed at each step, by the steps alone."""
    config, length = model.config, drawn.codes.shape[1]
    plan = drawn.schedule.plan(config.rows, config.columns)
    layout = layout_of(plan, model.action_tokens, length, context)
    n = len(layout.token)
    order = torch.arange(n)  # of being fed: what was given, one after the other
    frame = torch.zeros(n, dtype=torch.int64)
    clock = n
    for f in range(1, length):
        frame[layout.image(f) - model.action_tokens :] += 1
        for step in layout.steps(f) if f >= context else []:
            order[torch.from_numpy(step.slots)] = clock
            clock += 1
    order[n - 1] = clock
    slot = torch.arange(n)
    seen = (slot <= slot[:, None]) & (order <= order[:, None])
    if plan.refresh:  # until the true token is fed, which stands after it
        for stands_in in (x.slot for x in plan.feeds if x.stands_in):
            for j in range(stands_in, n, model.action_tokens + plan.slots):
                seen[:, j] &= order[j + 1] > order
                seen[j, j] = True  # some number where nothing is fed, that nothing sees
    if length > config.frames:
        seen &= frame > frame[:, None] - config.frames

    def dense(q: Tensor, k: Tensor, v: Tensor, **_: object) -> Tensor:
        k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v))
        t = q.shape[1]
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen[:t, :t])
        return out.transpose(1, 2)

    wide = WorldModel(config).double()
    wide.load_state_dict(model.state_dict())
    wide.rotary = wide.rotary.double()
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(world_model, "video_attention", dense)
        return wide.lm_head(
            wide.hidden(drawn.codes, drawn.actions, schedule=drawn.schedule, context=context)
        )


@row_ends
@pytest.mark.parametrize(("context", "actions"), [(1, 2), (2, 5)])
def test_log_probabilities_are_those_given_what_had_been_fed(
    context: int, actions: int, row_end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make("odd")
    for schedule in schedules(model, row_end):
        drawn = roll_out(model, [prompt(model, context, actions)], schedule, group_size=2)
        exact = (plain_hidden(model, drawn, context, monkeypatch) / 0.85).log_softmax(-1)
        exact = exact[:, context - 1 :]
        chosen = exact.gather(-1, drawn.codes[:, context:, :, None])[..., 0]
        found = drawn.logprob[:, context - 1 :]
        torch.testing.assert_close(found.double(), chosen, atol=5e-5, rtol=1e-5)
        entropy = -(exact.exp() * exact).sum(-1)
        found = drawn.entropy[:, context - 1 :]
        torch.testing.assert_close(found.double(), entropy, atol=5e-5, rtol=1e-5)


def test_another_schedule_is_seen() -> None:
    model = make("odd")
    drawn = roll_out(model, mixed_prompts(model), diagonal(2))
    for schedule in (sequential(), diagonal(1), diagonal(3)):
        other = dataclasses.replace(drawn, schedule=schedule)
        assert not same(trajectory_logprob(model, other, torch.float32), drawn.logprob)


@row_ends
def test_gradients_are_those_of_the_same_model_in_float64(row_end: str) -> None:
    model, schedule = make("odd"), diagonal(2, row_end)
    wide = WorldModel(model.config).double()
    wide.load_state_dict(model.state_dict())
    wide.rotary = wide.rotary.double()
    drawn = roll_out(model, [prompt(model, 2, 4)], schedule, group_size=2)
    for x in (model, wide):
        x.hidden(drawn.codes, drawn.actions, schedule=schedule, context=2).square().sum().backward()
    exact = dict(wide.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            scale = float(exact[name].grad.abs().max())
            error = float((parameter.grad - exact[name].grad).abs().max())
            assert error <= 1e-4 * scale, name
    assert model.stem.input.weight.grad.abs().sum() > 0


def test_trajectories_are_scored_on_what_was_drawn() -> None:
    model = make("odd")
    drawn = roll_out(
        model, mixed_prompts(model), diagonal(2), sampling=Sampling(temperature=0.9, top_p=0.7)
    )
    whole = trajectory_logprob(model, drawn, torch.float32)
    assert not whole[~drawn.drawn].any()
    rows = torch.tensor([4, 3])
    assert same(trajectory_logprob(model, drawn.rows(rows), torch.float32), whole[rows])
    one = drawn.rows(torch.tensor([4]))
    length, context = int(one.frames), int(one.context)
    scored = token_logprob(
        *(model, one.codes[:, :length], one.actions[:, : length - 1], 0.9, torch.float32),
        schedule=one.schedule,
        context=context,
        support=one.support[:, : length - 1],
    )
    assert same(scored[:, context - 1 :], whole[4:5, context - 1 : length - 1])
    assert (scored[:, : context - 1] < 0).all(), "given frames are scored too"
    whole.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_the_rotary_table_goes_on() -> None:
    model = make()
    have = model.config.positions
    assert model.rotary_until(7).data_ptr() == model.rotary.data_ptr()
    longer = model.rotary_until(have + 50)
    assert same(longer[:, :have].clone(), model.rotary)
    assert same(longer[:, have:].clone(), rotary_table(model.config, have, have + 50))
    assert model.rotary_until(have + 9).data_ptr() == longer.data_ptr()
    assert "rotary" not in model.state_dict()
    later = model.rotary_until(have + 51)
    assert same(later[:, : have + 50].clone(), longer)
