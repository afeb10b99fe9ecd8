"""The functions for verl against its formulas (verl 0.9.1, core_algos.py), written out here."""

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rlir.errors import InputError
from rlir.integrations import verl

MODES = verl.AGGREGATIONS


class Config(SimpleNamespace):
    """As much of verl's ActorConfig as its losses read."""

    def get(self, name: str, default: Any) -> Any:
        return getattr(self, name, default)


def config(**options: Any) -> Config:
    values = {"clip_ratio": 0.2, "clip_ratio_low": None, "clip_ratio_high": 0.28}
    return Config(**{**values, "global_batch_info": {}, **options})


def draw(seed: int = 0, b: int = 5, t: int = 40) -> tuple[Tensor, ...]:
    """Old and new log-probabilities, advantages, mask (int64, a row of zeros), weights; float64."""
    g = torch.Generator().manual_seed(seed)

    def normal(scale: float) -> Tensor:
        return scale * torch.randn(b, t, generator=g, dtype=torch.float64)

    new = -3 * torch.rand(b, t, generator=g, dtype=torch.float64)
    mask = (torch.rand(b, t, generator=g) < 0.7).long()
    mask[2] = 0
    weights = normal(0.3).exp()
    weights[weights > 1.4] = 0  # what a rejection does
    return new + normal(0.8), new, normal(1.0), mask, weights


def aggregate(
    loss: Tensor,
    mask: Tensor,
    mode: str,
    dp_size: int = 1,
    batch_num_tokens: int | None = None,
    global_batch_size: int | None = None,
    loss_scale_factor: int | None = None,
) -> Tensor:
    """verl's agg_loss."""
    if mode == "token-mean":
        return (loss * mask).sum() / (batch_num_tokens or mask.sum()) * dp_size
    if mode == "token-sum":
        return (loss * mask).sum() * dp_size
    rows = (loss * mask).sum(-1)
    if mode == "seq-mean-token-mean":
        rows = rows / (mask.sum(-1) + 1e-8)
    present = (mask.sum(-1) > 0).double()
    out = (rows * present).sum() / (global_batch_size or present.sum()) * dp_size
    return out / (loss_scale_factor or mask.shape[-1]) if mode.endswith("norm") else out


def vanilla(
    old: Tensor, new: Tensor, a: Tensor, mask: Tensor, mode: str, c: Config, weights: Tensor | None
) -> tuple[Tensor, dict[str, float]]:
    """verl's compute_policy_loss_vanilla."""
    low = c.clip_ratio if c.clip_ratio_low is None else c.clip_ratio_low
    high = c.clip_ratio if c.clip_ratio_high is None else c.clip_ratio_high
    dual = c.get("clip_ratio_c", 3.0)
    kl = (new - old).clamp(-20, 20)
    ratio = kl.exp()
    first, second = -a * ratio, -a * ratio.clamp(1 - low, 1 + high)
    clipped = torch.maximum(first, second)
    third = -a * dual
    losses = torch.where(a < 0, torch.min(third, clipped), clipped)

    def mean(x: Tensor) -> float:
        return float((x.detach() * mask).sum() / (mask.sum() + 1e-8))

    metrics = {
        "actor/pg_clipfrac": mean((second > first).double()),
        "actor/ppo_kl": mean(-kl),
        "actor/pg_clipfrac_lower": mean((clipped > third) * (a < 0).double()),
    }
    if weights is not None:
        losses = losses * weights
    return aggregate(losses, mask, mode, **c.global_batch_info), metrics


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"clip_ratio_c": 1.4, "clip_ratio_low": 0.1, "clip_ratio_high": None},
        {
            "global_batch_info": {
                "dp_size": 4,
                "batch_num_tokens": 300,
                "global_batch_size": 24,
                "loss_scale_factor": 40,
            }
        },
    ],
    ids=["plain", "dual", "global"],
)
def test_policy_loss_is_verls(mode: str, weighted: bool, options: dict) -> None:
    old, new, a, mask, weights = draw()
    c, w = config(**options), weights if weighted else None
    x, y = (new.clone().requires_grad_() for _ in range(2))
    loss, metrics = verl.policy_loss(old, x, a, mask, mode, c, w)
    expected, expected_metrics = vanilla(old, y, a, mask, mode, c, w)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-7, atol=0)
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-7, atol=1e-12)
    assert metrics == pytest.approx(expected_metrics, rel=1e-6)
    assert all(value != 0 for value in metrics.values())


def test_policy_loss_takes_verls_arguments_by_name() -> None:
    old, new, a, mask, _ = draw()
    loss, _ = verl.policy_loss(
        old_log_prob=old,
        log_prob=new,
        advantages=a,
        response_mask=mask,
        loss_agg_mode="token-mean",
        config=config(),
        rollout_is_weights=None,
    )
    assert loss.isfinite()
    nothing, metrics = verl.policy_loss(old, new, a, mask * 0, config=config())
    assert float(nothing) == 0
    assert set(metrics.values()) == {0.0}


def test_what_verl_would_refuse_or_get_wrong_is_refused() -> None:
    old, new, a, mask, _ = draw()
    for mode, options, message in (
        ("token-mean", None, "config must hold clip_ratio, got None"),
        ("mean", config(), "loss_agg_mode must be one of token-mean, "),
        ("token-mean", config(clip_ratio_c=1.1), r"clip_ratio_c must be >= 1 \+ 0.28, got 1.1"),
        ("token-mean", config(global_batch_info={"dp_size": 2}), "with batch_num_tokens, got None"),
        (MODES[-1], config(global_batch_info={"dp_size": 2}), "with global_batch_size, got None"),
    ):
        with pytest.raises(InputError, match=message):
            verl.policy_loss(old, new, a, mask, mode, options)


@pytest.mark.parametrize("by_std", [True, False])
def test_group_advantages_are_verls(by_std: bool) -> None:
    g = torch.Generator().manual_seed(0)
    rewards = torch.rand(9, 4, generator=g)
    mask = (torch.rand(9, 4, generator=g) < 0.7).long()
    index = np.array(["b", "a", "b", "alone", "a", "b", "c", "c", "c"], dtype=object)
    scores, groups = rewards.sum(-1), defaultdict(list)
    for i, name in enumerate(index):
        groups[name].append(float(scores[i]))
    expected = []
    for i, name in enumerate(index):
        group = torch.tensor(groups[name])
        mean, std = (group.mean(), group.std()) if len(group) > 1 else (0.0, 1.0)
        expected.append((scores[i] - mean) / (std + 1e-6) if by_std else scores[i] - mean)
    got, again = verl.compute_grpo_outcome_advantage(
        rewards, mask, index, norm_adv_by_std_in_grpo=by_std
    )
    torch.testing.assert_close(got, torch.stack(expected)[:, None] * mask, rtol=1e-5, atol=1e-6)
    assert again is got


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 600), (0,)])
def test_logprobs_from_logits(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    g = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(*shape, 33, generator=g)).to(dtype).requires_grad_()
    labels = torch.randint(0, 33, shape, generator=g)
    kept = logits.detach().clone()
    got = verl.logprobs_from_logits(logits, labels, inplace_backward=True)
    weights = torch.randn(shape, generator=g)
    (got * weights).sum().backward()
    wide = kept.double().requires_grad_()
    expected = wide.log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    (expected * weights).sum().backward()
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(logits.grad.double(), wide.grad, rtol=tolerance, atol=tolerance)
    assert logits.equal(kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 600)])
def test_fused_linear_for_ppo(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(*shape, 16, generator=g).to(dtype).requires_grad_()
    weight = (torch.randn(33, 16, generator=g) / 2).to(dtype).requires_grad_()
    ids = torch.randint(0, 33, shape, generator=g, dtype=torch.int32)
    logprob, entropy = verl.FusedLinearForPPO()(hidden, weight, ids, temperature=0.7)
    assert logprob.dtype == torch.float32
    assert entropy.dtype == dtype
    mix = torch.randn(2, *shape, generator=g)
    (logprob * mix[0] + entropy.float() * mix[1]).sum().backward()
    h, w = (x.detach().double().requires_grad_() for x in (hidden, weight))
    logp = (h @ w.t() / 0.7).log_softmax(-1)
    expected = logp.gather(-1, ids.long()[..., None])[..., 0]
    spread = -(logp.exp() * logp).sum(-1)
    (expected * mix[0] + spread * mix[1]).sum().backward()
    close = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.1}
    for a, b in ((logprob, expected), (entropy, spread), (hidden.grad, h.grad)):
        torch.testing.assert_close(a.double(), b, **close)
    error = (weight.grad.double() - w.grad).norm() / w.grad.norm()
    assert error < (1e-5 if dtype == torch.float32 else 0.02)
