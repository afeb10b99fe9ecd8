"""The function for torchrl against GRPOLoss's formulas (0.14.1), written out here."""

import pytest
import torch
from torch import Tensor

from rlir.errors import InputError
from rlir.integrations.torchrl import grpo_loss


def draw(seed: int = 0, b: int = 4, t: int = 17) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(seed)

    def normal(scale: float) -> Tensor:
        return scale * torch.randn(b, t, generator=g, dtype=torch.float64)

    new = -3 * torch.rand(b, t, generator=g, dtype=torch.float64)
    mask = torch.rand(b, t, generator=g) < 0.7
    return new, new + normal(0.5), normal(1.0)[..., None], new + normal(0.6), mask


def published(
    new: Tensor,
    old: Tensor,
    a: Tensor,
    ref: Tensor,
    mask: Tensor,
    low: float,
    high: float,
    aggregation: str,
    coeff: float,
) -> dict[str, Tensor]:
    """GRPOLoss.forward, _compute_policy_objective, _aggregate_loss_value and _kl_to_ref."""
    new, old, ref = (x.where(mask, 0.0) for x in (new, old, ref))
    log_weight = (new - old)[..., None]
    bounds = torch.tensor([-low, high], dtype=torch.float64).log1p()
    clipped = log_weight.clamp(*bounds)
    gain = torch.stack([log_weight.exp() * a, clipped.exp() * a], -1).min(-1).values
    if aggregation == "token_mean":
        objective = -gain[mask].mean()
    else:
        m = mask[..., None].double()
        objective = ((-gain * m).sum(-2) / m.sum(-2).clamp_min(1)).mean()
    lw = log_weight[..., 0][mask]
    diff = ref - new
    kl = (diff.expm1() - diff).mean()
    return {
        "loss_objective": objective,
        "clip_fraction": (clipped != log_weight)[mask].double().mean(),
        "kl_approx": (old - new)[mask].mean(),
        "ESS": (2 * lw.logsumexp(0) - (2 * lw).logsumexp(0)).exp() / mask.sum(),
        "loss_kl_to_ref": coeff * kl,
        "kl_to_ref": kl,
    }


@pytest.mark.parametrize("aggregation", ["token_mean", "prompt_mean"])
@pytest.mark.parametrize("clip", [0.2, (0.2, 0.28)])
@pytest.mark.parametrize("masked", [False, True])
def test_grpo_loss_is_torchrls(aggregation: str, clip: float | tuple, masked: bool) -> None:
    new, old, a, ref, mask = draw()
    mask = mask if masked else torch.ones_like(mask)
    low, high = clip if isinstance(clip, tuple) else (clip, clip)
    x, y = (new.clone().requires_grad_() for _ in range(2))
    got = grpo_loss(
        x,
        old,
        a,
        mask if masked else None,
        clip_epsilon=clip,
        aggregation=aggregation,
        kl_to_ref_coeff=0.1,
        ref_log_prob=ref,
    )
    expected = published(y, old, a, ref, mask, low, high, aggregation, 0.1)
    assert got.keys() == expected.keys()
    for name, value in got.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-12)
    (got["loss_objective"] + got["loss_kl_to_ref"]).backward()
    (expected["loss_objective"] + expected["loss_kl_to_ref"]).backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-9, atol=1e-12)


def test_without_a_reference_there_is_no_penalty() -> None:
    new, old, a, _, mask = draw()
    assert "loss_kl_to_ref" not in grpo_loss(new, old, a[..., 0], mask)
    with pytest.raises(InputError, match="kl_to_ref_coeff must come with ref_log_prob"):
        grpo_loss(new, old, a, mask, kl_to_ref_coeff=0.1)
    with pytest.raises(InputError, match="aggregation must be 'token_mean' or 'prompt_mean'"):
        grpo_loss(new, old, a, mask, aggregation="none")
