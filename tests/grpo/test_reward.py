"""The reward is the share of factors that are read as commanded, and NaN stays NaN."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from testkit import examples
from torch import Tensor

from rlir.actions.space import DOOM
from rlir.grpo.config import GrpoConfig
from rlir.grpo.reward import InverseReward, draw
from rlir.models.idm import InverseDynamics
from rlir.models.tokenizer import Tokenizer

SIZES = DOOM.factor_sizes
FACTORS = len(SIZES)


class Oracle:
    """Stands in for an IDM: row i of what it is shown holds i, and it says logits[i]."""

    config = SimpleNamespace(space="doom")

    def __init__(self, logits: list[Tensor]):
        self.logits = logits

    def __call__(self, frames: Tensor) -> tuple[Tensor, ...]:
        rows = frames.long()
        return tuple(x[rows] for x in self.logits)


def setting(b: int, t: int, seed: int = 0) -> tuple[Oracle, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = [2 * torch.randn(b, t, size, generator=generator) for size in SIZES]
    columns = [torch.randint(size, (b, t), generator=generator) for size in SIZES]
    return Oracle(logits), torch.arange(b).float(), torch.stack(columns, -1)


def rewarded(oracle: Oracle, frames: Tensor, actions: Tensor, batch: int = 64, **config):
    return InverseReward(oracle, GrpoConfig(**config))(frames, actions, batch)


@settings(max_examples=examples(30))
@given(
    b=st.integers(1, 9),
    t=st.integers(1, 4),
    weight=st.sampled_from([0, 0.5, 1, 3]),
    seed=st.integers(0, 999),
    batch=st.integers(1, 10),
)
def test_a_match_is_the_weighted_share_of_factors_that_agree(
    b: int, t: int, weight: float, seed: int, batch: int
) -> None:
    oracle, frames, actions = setting(b, t, seed)
    found = rewarded(oracle, frames, actions, batch, camera_weight=weight)
    weights = [weight, 1.0, 1.0, 1.0]
    for i in range(b):
        for j in range(t):
            read = [int(oracle.logits[f][i, j].argmax()) for f in range(FACTORS)]
            assert found.read[i, j].tolist() == read
            hits = [float(r == int(c)) for r, c in zip(read, actions[i, j], strict=True)]
            share = sum(w * h for w, h in zip(weights, hits, strict=True)) / sum(weights)
            assert float(found.frame[i, j]) == pytest.approx(share, abs=1e-6)


@settings(max_examples=examples(15))
@given(b=st.integers(1, 5), t=st.integers(1, 4), seed=st.integers(0, 999))
def test_a_probability_is_the_mean_probability_of_the_commanded_classes(
    b: int, t: int, seed: int
) -> None:
    oracle, frames, actions = setting(b, t, seed)
    found = rewarded(oracle, frames, actions, reward="probability", camera_weight=2.0)
    expected = torch.zeros(b, t)
    for f, logits in enumerate(oracle.logits):
        p = logits.softmax(-1).gather(-1, actions[..., f : f + 1])[..., 0]
        expected += p * (2.0 if f == 0 else 1.0) / 5.0
    torch.testing.assert_close(found.frame, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", ["match", "probability"])
def test_obeying_in_everything_is_one_and_in_nothing_zero(kind: str) -> None:
    _, frames, actions = setting(3, 4)
    right = [
        torch.nn.functional.one_hot(actions[..., f], n).float() * 99 for f, n in enumerate(SIZES)
    ]
    found = rewarded(Oracle(right), frames, actions, reward=kind)
    torch.testing.assert_close(found.frame, torch.ones(3, 4))
    wrong = rewarded(Oracle([-x for x in right]), frames, actions, reward=kind)
    torch.testing.assert_close(wrong.frame, torch.zeros(3, 4), atol=1e-6, rtol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("factor", range(FACTORS))
@pytest.mark.parametrize("kind", ["match", "probability"])
def test_logits_that_are_not_finite_give_no_reward(kind: str, factor: int, value: float) -> None:
    oracle, frames, actions = setting(4, 3)
    oracle.logits[factor][2, 1, 0] = value
    found = rewarded(oracle, frames, actions, reward=kind).frame
    assert found[2, 1].isnan()
    found[2, 1] = 0
    assert found.isfinite().all(), "the other frames keep theirs"


def test_a_real_idm_reads_what_its_own_reading_is(idm: InverseDynamics) -> None:
    """Commanding what it reads is rewarded in full; the reward has no gradient."""
    torch.manual_seed(0)
    frames = torch.rand(5, 4, 3, 16, 48) * 2 - 1
    reward = InverseReward(idm.requires_grad_(True), GrpoConfig())
    read = reward(frames, torch.zeros(5, 3, FACTORS, dtype=torch.int64)).read
    again = reward(frames, read, batch=2)
    assert float(again.frame.mean()) > 0.95  # bfloat16 sums depend on the batch
    assert not again.frame.requires_grad


def test_drawn_frames_are_the_decoded_codes(tokenizer: Tokenizer) -> None:
    codes = torch.randint(16, (3, 4, 8))
    frames = draw(tokenizer, codes)
    assert frames.shape == (3, 4, 3, 16, 48)
    assert frames.dtype == torch.float32
    torch.testing.assert_close(draw(tokenizer, codes, batch=5), frames, atol=0.02, rtol=0.02)
    exact = tokenizer.decode(codes[1])
    torch.testing.assert_close(frames[1], exact, atol=0.05, rtol=0.05)
