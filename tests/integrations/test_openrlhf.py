"""The functions for OpenRLHF against its formulas (0.11.2, models/loss.py), written out here."""

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from rlir.errors import InputError
from rlir.integrations.openrlhf import PolicyLoss, log_probs_from_logits

NAMES = ("clip_ratio", "ppo_kl", "vllm_kl", "is_filter_ratio")


def draw(seed: int = 0, b: int = 5, t: int = 21) -> tuple[Tensor, ...]:
    """Log-probabilities new, old and of the rollout, advantages, mask; float64."""
    g = torch.Generator().manual_seed(seed)

    def normal(scale: float) -> Tensor:
        return scale * torch.randn(b, t, generator=g, dtype=torch.float64)

    new = -0.1 - 3 * torch.rand(b, t, generator=g, dtype=torch.float64)
    old = (new + normal(0.5)).clamp(max=-0.01)
    mask = (torch.rand(b, t, generator=g) < 0.7).double()
    return new, old, (old + normal(0.5)).clamp(max=-0.01), normal(1.0), mask


def masked_mean(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    return (x * mask).sum(dim) / mask.sum(dim)


def published(
    new: Tensor, old: Tensor, rollout: Tensor, a: Tensor, mask: Tensor, o: dict[str, Any], g: dict
) -> tuple[Tensor | None, ...]:
    """OpenRLHF's PolicyLoss.forward and aggregate_loss."""
    kind, level = o.get("policy_loss_type", "ppo"), o.get("is_correction_level", "off")
    gating, mode = o.get("is_correction_gating", "ratio"), o.get("is_correction_mode", "mask")
    low, high = o.get("clip_eps_low", 0.2), o.get("clip_eps_high", 0.2)
    if kind == "ppo":
        ratio = (new - old).clamp(-20, 20).exp()
    else:
        log_ratio = new - (old if level == "off" else rollout)
        ratio = ((log_ratio * mask).sum(-1) / mask.sum(-1).clamp(min=1)).exp()[:, None] * mask
    first, second = ratio * a, ratio.clamp(1 - low, 1 + high) * a
    loss = -torch.min(first, second)
    if (dual := o.get("dual_clip")) is not None:
        loss = -torch.where(a < 0, torch.max(-loss, dual * a), -loss)
    kl = share = None
    if level != "off" and kind == "ppo":
        bottom, top = o["is_correction_threshold"]
        log_is = old - rollout
        if gating == "ratio":
            stat = (masked_mean(log_is, mask, -1)[:, None] if level == "seq" else log_is).exp()
        else:
            p, q = rollout.exp().clamp(1e-6, 1 - 1e-6), old.exp().clamp(1e-6, 1 - 1e-6)
            stat = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
            stat = (p - q).abs() if gating == "tv" else stat
            stat = masked_mean(stat, mask, -1)[:, None] if level == "seq" else stat
        outside = (stat < bottom) | (stat > top)
        weight = stat.clamp(bottom, top) if mode == "clip" else log_is.exp() * ~outside
        loss = loss * weight
        outside = outside.double()
        share = outside.mean() if level == "seq" else masked_mean(outside, mask)
        kl = masked_mean(rollout - old, mask)
    dp = g.get("dp_size", 1)
    if o.get("token_level_loss", True) and kind == "ppo":
        n = g.get("batch_num_tokens")
        total = masked_mean(loss, mask) if n is None else (loss * mask).sum() / n * dp
    else:
        rows, here = (loss * mask).sum(-1) / (mask.sum(-1) + 1e-8), (mask.sum(-1) > 0).double()
        n = g.get("global_batch_size")
        total = masked_mean(rows, here) if n is None else (rows * here).sum() / n * dp
    clipped = masked_mean((second < first).double(), mask)
    return total, clipped, masked_mean(old - new, mask).detach(), kl, share


CORRECTIONS: list[dict[str, Any]] = [
    {},
    {"is_correction_level": "token", "is_correction_threshold": (0.6, 1.5)},
    {
        "is_correction_level": "token",
        "is_correction_mode": "clip",
        "is_correction_threshold": (0.6, 1.5),
    },
    {"is_correction_level": "seq", "is_correction_threshold": (0.9, 1.1)},
    *(
        {
            "is_correction_level": level,
            "is_correction_gating": gating,
            "is_correction_threshold": (0.0, 0.05),
        }
        for level, gating in product(("token", "seq"), ("binary_kl", "tv"))
    ),
]
LOSSES: list[dict[str, Any]] = [
    {},
    {"dual_clip": 1.6, "clip_eps_high": 0.28},
    {"token_level_loss": False},
    {"policy_loss_type": "gspo", "clip_eps_low": 0.01, "clip_eps_high": 0.01},
]
GLOBAL = {"dp_size": 4, "batch_num_tokens": 300, "global_batch_size": 24}


@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("options", LOSSES)
@pytest.mark.parametrize("totals", [{}, GLOBAL], ids=["local", "global"])
def test_policy_loss_is_openrlhfs(options: dict, correction: dict, totals: dict) -> None:
    new, old, rollout, a, mask = draw()
    if options.get("policy_loss_type") == "gspo":
        mask[:] = 1  # rows of one length: over rows and over tokens the share clipped is the same
        a = a[:, :1].expand_as(a)
    options = {**options, **correction}
    x, y = (new.clone().requires_grad_() for _ in range(2))
    got = PolicyLoss(**options)(x, old, a, mask, rollout, **totals)
    expected = published(y, old, rollout, a, mask, options, totals)
    got[0].backward()
    expected[0].backward()
    torch.testing.assert_close(got[0], expected[0], rtol=1e-7, atol=1e-12)
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-7, atol=1e-12)
    for name, value, wanted in zip(NAMES, got[1:], expected[1:], strict=True):
        assert (value is None) == (wanted is None), name
        if value is not None:
            assert float(value) == pytest.approx(float(wanted), rel=1e-6), name


def test_a_row_without_a_token_does_not_count() -> None:
    new, old, rollout, a, mask = draw()
    mask[2] = 0
    keep = torch.tensor([0, 1, 3, 4])
    for options in ({"token_level_loss": False}, {"policy_loss_type": "gspo"}, {}):
        loss = PolicyLoss(**options)
        whole = loss(new, old, a, mask)[0]
        assert float(whole) == pytest.approx(
            float(loss(new[keep], old[keep], a[keep], mask[keep])[0])
        )
    assert float(PolicyLoss()(new, old, a, mask * 0, rollout)[0]) == 0
    assert PolicyLoss()(new, old, a)[0].isfinite()


def test_what_openrlhf_would_refuse_is_refused() -> None:
    for options, message in (
        ({"policy_loss_type": "sac"}, "policy_loss_type must be one of ppo, gspo, got 'sac'"),
        ({"dual_clip": 1.1}, r"dual_clip must be >= 1 \+ 0.2, got 1.1"),
        (
            {"is_correction_level": "seq", "is_correction_mode": "clip"},
            "is_correction_mode clip must come with level token and gating ratio",
        ),
    ):
        with pytest.raises(InputError, match=message):
            PolicyLoss(**options)
    new, old, _, a, mask = draw()
    with pytest.raises(InputError, match="must come with rollout_log_probs"):
        PolicyLoss(is_correction_level="token")(new, old, a, mask)


def test_log_probs_from_logits() -> None:
    logits = torch.randn(3, 5, 11, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 11, (3, 5))
    kept = logits.detach().clone()
    got = log_probs_from_logits(logits, labels, temperature=0.6)
    expected = (kept / 0.6).log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    torch.testing.assert_close(got, expected)
    assert logits.equal(kept)
    assert torch.autograd.gradcheck(lambda x: log_probs_from_logits(x, labels, 0.6), (logits,))
