"""The policy loss is the published formula, clips where it should and has its gradient."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from testkit import examples
from torch import Tensor

from rlir.grpo.loss import policy_loss

SETTINGS = {"clip_low": 0.2, "clip_high": 0.3, "kl_weight": 0.05}


def draws(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """Log-probabilities of policy, old policy and base, and advantages [B, T]."""
    generator = torch.Generator().manual_seed(seed)
    new, old, ref = -torch.rand(3, *shape, generator=generator, dtype=dtype) * 3
    advantages = torch.randn(*shape[:-1], 1, generator=generator, dtype=dtype)
    return new, old, advantages, ref


def published(
    new: float, old: float, advantage: float, ref: float, low: float, high: float, weight: float
) -> float:
    """Equations 3 and 4 of arXiv 2402.03300, one token."""
    import math

    ratio = math.exp(new - old)
    clipped = min(max(ratio, 1 - low), 1 + high)
    kl = math.exp(ref - new) - (ref - new) - 1
    return -(min(ratio * advantage, clipped * advantage) - weight * kl)


@settings(max_examples=examples(40))
@given(b=st.integers(1, 5), t=st.integers(1, 9), seed=st.integers(0, 999))
def test_the_loss_is_the_published_formula(b: int, t: int, seed: int) -> None:
    new, old, advantages, ref = draws(seed, b, t)
    loss, _ = policy_loss(new, old, advantages, ref, **SETTINGS)
    total = 0.0
    for i in range(b):
        for j in range(t):
            values = (new[i, j], old[i, j], advantages[i, 0], ref[i, j])
            total += published(*map(float, values), 0.2, 0.3, 0.05)
    assert float(loss) == pytest.approx(total / (b * t), rel=1e-12)


def test_the_loss_broadcasts_an_advantage_over_a_frames_tokens() -> None:
    new, old, _, ref = (x.view(2, 3, 4) for x in draws(0, 6, 4)[:2] + draws(1, 6, 4)[:2])
    advantages = torch.randn(2, 3, 1, dtype=torch.float64)
    loss, _ = policy_loss(new, old, advantages, ref, **SETTINGS)
    flat = [x.flatten(0, 1) for x in (new, old, advantages, ref)]
    assert float(loss) == pytest.approx(float(policy_loss(*flat, **SETTINGS)[0]), rel=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_the_gradient_is_that_of_the_formula(seed: int) -> None:
    new, old, advantages, ref = draws(seed, 3, 4)
    new.requires_grad_(True)
    assert torch.autograd.gradcheck(
        lambda x: policy_loss(x, old, advantages, ref, **SETTINGS)[0], (new,)
    )


@pytest.mark.parametrize(
    ("ratio", "advantage", "passes"),
    [
        (1.0, 1.0, True),
        (1.0, -1.0, True),
        (1.4, 1.0, False),  # already more likely than the clip allows: no more of it
        (1.4, -1.0, True),  # more likely, and bad: back
        (0.7, 1.0, True),  # less likely, and good: back
        (0.7, -1.0, False),  # already less likely than the clip allows
        (1.25, 1.0, True),  # within 1 + clip_high, beyond 1 + clip_low
        (0.85, -1.0, True),
    ],
)
def test_the_clip_stops_what_went_far_enough_and_nothing_else(
    ratio: float, advantage: float, passes: bool
) -> None:
    old = torch.full((1, 1), -1.0, dtype=torch.float64)
    new = (old + torch.tensor(ratio, dtype=torch.float64).log()).requires_grad_(True)
    loss, statistics = policy_loss(
        new, old, torch.full((1, 1), advantage).double(), new.detach(), **SETTINGS
    )
    loss.backward()
    expected = -ratio * advantage if passes else 0.0
    assert float(new.grad) == pytest.approx(expected, abs=1e-9)
    assert statistics.clip_fraction == float(not 0.8 <= ratio <= 1.3)
    assert statistics.ratio == pytest.approx(ratio)


def test_on_policy_the_gradient_is_the_plain_policy_gradient() -> None:
    new, _, advantages, _ = draws(0, 4, 5)
    new.requires_grad_(True)
    loss, statistics = policy_loss(new, new.detach(), advantages, new.detach(), **SETTINGS)
    loss.backward()
    torch.testing.assert_close(new.grad, (-advantages / 20).expand(4, 5))
    assert statistics == type(statistics)(kl=0.0, clip_fraction=0.0, ratio=1.0)


@given(st.integers(0, 999))
@settings(max_examples=examples(20))
def test_the_divergence_is_never_negative(seed: int) -> None:
    new, _, _, ref = draws(seed, 2, 6)
    none = torch.zeros(2, 1, dtype=torch.float64)
    loss, statistics = policy_loss(new, new, none, ref, clip_low=0.2, clip_high=0.2, kl_weight=1.0)
    assert statistics.kl >= 0
    assert float(loss) == pytest.approx(statistics.kl)


def test_a_token_that_the_base_finds_far_likelier_does_not_overflow() -> None:
    new = torch.full((1, 1), -200.0, requires_grad=True)
    loss, _ = policy_loss(new, new.detach(), torch.ones(1, 1), torch.zeros(1, 1), **SETTINGS)
    loss.backward()
    assert loss.isfinite()
    assert new.grad.isfinite().all()
    assert float(new.grad) < 0, "the loss falls where the token gets likelier"


def test_only_the_policy_has_a_gradient() -> None:
    tensors = [x.requires_grad_(True) for x in draws(0, 2, 3)]
    loss, _ = policy_loss(*tensors, **SETTINGS)
    loss.backward()
    assert tensors[0].grad is not None
