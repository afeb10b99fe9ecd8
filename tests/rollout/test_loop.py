"""Rollouts are what a teacher-forced forward says they are, and are drawn from its distribution."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from testkit import WORLD_MODEL, examples, stirred
from torch import Tensor

from rlir.actions.space import DOOM
from rlir.errors import InputError
from rlir.models.world_model import WorldModel, WorldModelConfig
from rlir.rollout.loop import Rollouts, inference_copy, rollout

S, V = WORLD_MODEL.tokens, WORLD_MODEL.codes


def make(seed: int = 0, **sizes: int) -> WorldModel:
    torch.manual_seed(seed)
    config = WorldModelConfig(**{**vars(WORLD_MODEL), **sizes})
    return stirred(WorldModel(config), seed=seed).eval().requires_grad_(False)


def prompts_and_actions(count: int, length: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randint(V, (count, S), generator=generator)
    columns = [
        torch.randint(size, (count, length - 1), generator=generator) for size in DOOM.factor_sizes
    ]
    return prompts, torch.stack(columns, -1)


def draw(model: WorldModel, prompts: Tensor, actions: Tensor, seed: int = 0, **more) -> Rollouts:
    return rollout(inference_copy(model, torch.float32), prompts, actions, seed=seed, **more)


def teacher_forced(
    model: WorldModel, codes: Tensor, actions: Tensor, temperature: float = 1.0
) -> Tensor:
    """Log-probabilities [B, L - 1, S, V] of a forward over the whole stream, in float64."""
    wide = WorldModel(model.config).double()
    wide.load_state_dict(model.state_dict())
    wide.rotary = wide.rotary.double()
    with torch.no_grad():
        return wide(codes, wide.action_ids(actions)).div(temperature).log_softmax(-1)


@settings(max_examples=examples(25))
@given(
    count=st.integers(1, 4),
    group_size=st.integers(1, 4),
    length=st.integers(1, 5),
    temperature=st.sampled_from([0.5, 1.0, 2.0]),
    heads=st.sampled_from([(4, 2), (4, 4), (2, 1)]),
    seed=st.integers(0, 999),
)
def test_log_probabilities_are_those_of_a_teacher_forced_forward(
    count: int, group_size: int, length: int, temperature: float, heads: tuple[int, int], seed: int
) -> None:
    model = make(heads=heads[0], kv_heads=heads[1])
    prompts, actions = prompts_and_actions(count, length, seed)
    drawn = draw(model, prompts, actions, seed, group_size=group_size, temperature=temperature)
    b = count * group_size
    assert drawn.codes.shape == (b, length, S)
    assert drawn.logprob.shape == (b, length - 1, S)
    assert drawn.entropy.shape == (length - 1, S)
    assert torch.equal(drawn.codes[:, 0], prompts.repeat_interleave(group_size, 0))
    assert 0 <= int(drawn.codes.min()) <= int(drawn.codes.max()) < V
    if length == 1:
        return
    commanded = actions.repeat_interleave(group_size, 0)
    exact = teacher_forced(model, drawn.codes, commanded, temperature)
    chosen = exact.gather(-1, drawn.codes[:, 1:, :, None])[..., 0]
    torch.testing.assert_close(drawn.logprob.double(), chosen, atol=2e-5, rtol=1e-5)
    entropy = -(exact.exp() * exact).sum(-1).mean(0)
    torch.testing.assert_close(drawn.entropy.double(), entropy, atol=2e-5, rtol=1e-5)


def test_a_rounded_policy_is_near_its_model() -> None:
    model = make()
    prompts, actions = prompts_and_actions(3, 5)
    drawn = rollout(inference_copy(model), prompts, actions, group_size=2, seed=0)
    exact = teacher_forced(model, drawn.codes, actions.repeat_interleave(2, 0))
    chosen = exact.gather(-1, drawn.codes[:, 1:, :, None])[..., 0]
    assert drawn.logprob.dtype == torch.float32
    assert float((drawn.logprob - chosen).abs().mean()) < 0.05


@settings(max_examples=examples(10))
@given(count=st.integers(1, 3), length=st.integers(2, 5), seed=st.integers(0, 999))
def test_greedy_is_the_argmax_of_a_teacher_forced_forward(
    count: int, length: int, seed: int
) -> None:
    model = make()
    prompts, actions = prompts_and_actions(count, length, seed)
    drawn = draw(model, prompts, actions, temperature=0)
    exact = teacher_forced(model, drawn.codes, actions)
    chosen = exact.gather(-1, drawn.codes[:, 1:, :, None])[..., 0]
    # Where two codes are equally likely to rounding, either is the argmax.
    torch.testing.assert_close(chosen, exact.amax(-1), atol=2e-5, rtol=0)
    torch.testing.assert_close(drawn.logprob.double(), chosen, atol=2e-5, rtol=1e-5)


def test_greedy_members_of_a_group_are_equal_and_draw_nothing() -> None:
    model = make()
    prompts, actions = prompts_and_actions(2, 4)
    drawn = draw(model, prompts, actions, seed=3, group_size=3, temperature=0)
    assert torch.equal(
        drawn.codes, draw(model, prompts, actions, 4, group_size=3, temperature=0).codes
    )
    groups = drawn.codes.view(2, 3, 4, S)
    assert (groups == groups[:, :1]).all()


def test_members_of_a_group_share_prompt_and_actions_and_differ_in_what_was_drawn() -> None:
    """Prompt p's members are rows p * G .. (p + 1) * G."""
    model = make()
    prompts, actions = prompts_and_actions(3, 5)
    drawn = draw(model, prompts, actions, group_size=4)
    for p in range(3):
        rows = slice(4 * p, 4 * p + 4)
        own = teacher_forced(model, drawn.codes[rows], actions[p : p + 1].expand(4, -1, -1))
        chosen = own.gather(-1, drawn.codes[rows, 1:, :, None])[..., 0]
        torch.testing.assert_close(drawn.logprob[rows].double(), chosen, atol=2e-5, rtol=1e-5)
        assert len(drawn.codes[rows].flatten(1).unique(dim=0)) == 4


def test_the_seed_decides_and_nothing_else() -> None:
    model = make()
    prompts, actions = prompts_and_actions(2, 4)
    first = draw(model, prompts, actions, seed=1, group_size=3)
    torch.manual_seed(99)
    again = draw(model, prompts, actions, seed=1, group_size=3)
    other = draw(model, prompts, actions, seed=2, group_size=3)
    assert torch.equal(first.codes, again.codes)
    assert torch.equal(first.logprob, again.logprob)
    assert not torch.equal(first.codes, other.codes)


@pytest.mark.parametrize("temperature", [0.6, 1.0])
def test_codes_are_drawn_as_often_as_they_are_likely(temperature: float) -> None:
    model = make()
    prompts, actions = prompts_and_actions(1, 2)
    n = 6000
    drawn = draw(model, prompts, actions, group_size=n, temperature=temperature)
    exact = model(drawn.codes, model.action_ids(actions.expand(n, -1, -1)))
    likely = exact.div(temperature).softmax(-1)[:, 0].double()
    first = np.bincount(drawn.codes[:, 1, 0], minlength=V)
    assert chisquare(first, (likely[0, 0] / likely[0, 0].sum() * n).numpy()).pvalue > 1e-3
    # Later tokens: each has a distribution of its own; the counts' expectation is their sum.
    for i in range(1, S):
        expected = likely[:, i].sum(0)
        expected = (expected / expected.sum() * n).numpy()
        found = np.bincount(drawn.codes[:, 1, i], minlength=V)
        assert chisquare(found, expected).pvalue > 1e-4


def test_an_unlikely_code_is_not_drawn() -> None:
    """A head that wants one code alone, at either end of the codebook."""
    for wanted in (0, V - 1):
        model = make()
        model.lm_head.weight.zero_()
        prompts, actions = prompts_and_actions(2, 3)
        first = draw(model, prompts, actions, group_size=50)
        assert len(first.codes[:, 1:].unique()) == V, "equal logits: all codes come"
        model.lm_head = Biased(model.lm_head, wanted)
        found = draw(model, prompts, actions, group_size=50)
        assert (found.codes[:, 1:] == wanted).all()
        torch.testing.assert_close(
            found.logprob, torch.zeros_like(found.logprob), atol=1e-6, rtol=0
        )


class Biased(torch.nn.Module):
    """Logits with 60 added to one code."""

    def __init__(self, head: torch.nn.Linear, code: int):
        super().__init__()
        self.weight, self.code = head.weight, code

    def forward(self, x: Tensor) -> Tensor:
        logits = x @ self.weight.T
        logits[..., self.code] += 60
        return logits


def test_rollouts_can_be_trained_on() -> None:
    """What comes back is ordinary tensors, although it was made in inference mode."""
    model = make().requires_grad_(True)
    prompts, actions = prompts_and_actions(2, 3)
    drawn = draw(model, prompts, actions)
    logits = model(drawn.codes, model.action_ids(actions))
    chosen = logits.log_softmax(-1).gather(-1, drawn.codes[:, 1:, :, None])[..., 0]
    ((chosen - drawn.logprob).exp() * drawn.logprob).sum().backward()
    assert model.lm_head.weight.grad.abs().sum() > 0


def test_the_inference_copy_is_rounded_frozen_and_apart() -> None:
    model = make().requires_grad_(True)
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
        ({"group_size": 0}, "group_size must be >= 1"),
        ({"group_size": -2}, "group_size must be >= 1"),
        ({"temperature": -0.1}, "temperature >= 0, got 1 and -0.1"),
        ({"prompts": torch.zeros(2, S + 1, dtype=torch.int64)}, f"prompts must have {S} tokens"),
        ({"actions": torch.zeros(2, 5, 4, dtype=torch.int64)}, "at most 5 frames, got 8 and 6"),
        (
            {"actions": torch.zeros(3, 4, 4, dtype=torch.int64)},
            "each have an action sequence, got 2 and 3",
        ),
        ({"actions": torch.zeros(2, 4, 3, dtype=torch.int64)}, "must be 4 factors of doom"),
        ({"actions": torch.full((2, 4, 4), 9)}, "classes of doom must be from 0"),
        ({"prompts": torch.full((2, S), V)}, f"codes must be from 0 and below {V}"),
        ({"prompts": torch.full((2, S), -1)}, f"codes must be from 0 and below {V}"),
        ({"prompts": torch.zeros(2, S)}, "prompts must be int64 of 2 dimensions"),
        ({"actions": torch.zeros(2, 4, dtype=torch.int64)}, "actions must be int64 of 3"),
        ({"seed": -1}, "seed must be from 0 and below 2.63, got -1"),
        ({"seed": 2**63}, "seed must be from 0"),
        ({"temperature": float("nan")}, "temperature >= 0, got 1 and nan"),
        ({"row_ids": torch.zeros(3, dtype=torch.int64)}, r"row_ids must be int64 \[2\]"),
    ],
)
def test_input_that_does_not_fit_is_refused(change: dict, message: str) -> None:
    prompts, actions = prompts_and_actions(2, 5)
    arguments = {"prompts": prompts, "actions": actions, **change}
    with pytest.raises(InputError, match=message):
        draw(make(), **arguments)
