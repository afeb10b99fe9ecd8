"""The project's own exp (float32) and log (float64): accuracy over the whole range."""

import numpy as np
import pytest
import torch
from torch import Tensor

from rlir import _library

pytestmark = pytest.mark.skipif(_library.PATH is None, reason="the reference is forced")


def ulps(got: Tensor, exact: np.ndarray) -> float:
    """The largest error in units of the last place of the exact result."""
    dtype = got.numpy().dtype
    unit = np.spacing(np.abs(exact).astype(dtype)).astype(np.longdouble)
    return float((np.abs(got.numpy().astype(np.longdouble) - exact) / unit).max())


def test_exp_is_as_exact_as_it_says() -> None:
    g = torch.Generator().manual_seed(0)
    parts = [
        torch.linspace(-104, 88.72, 400_001),
        torch.rand(200_000, generator=g) * -20,
        torch.randn(100_000, generator=g) * 1e-3,
        torch.tensor([0.0, -0.0, 1e-45, -87.33655, -103.9, 88.72283]),
    ]
    x = torch.cat(parts)
    exact = np.exp(x.numpy().astype(np.longdouble))
    assert ulps(torch.ops.rlir._exp(x), exact) < 1.02


def test_exp_of_special_values() -> None:
    x = torch.tensor([-torch.inf, -1e30, -104.0, 89.0, 1e30, torch.inf, torch.nan, 0.0, -0.0])
    out = torch.ops.rlir._exp(x)
    assert out[:3].eq(0).all()
    assert out[3:6].isposinf().all()
    assert out[6].isnan()
    assert out[7:].eq(1).all()


def test_log_is_within_two_ulps() -> None:
    g = torch.Generator().manual_seed(0)
    wide = torch.exp2(torch.rand(100_000, generator=g, dtype=torch.float64) * 2090 - 1070)
    near = 1 + torch.randn(100_000, generator=g, dtype=torch.float64) * 1e-3
    sums = 1 + torch.rand(100_000, generator=g, dtype=torch.float64) * 1e5
    few = [5e-324, 2.2e-308, 1.0 + 2**-52, 1.0 - 2**-53, 1.5, 0.75, 1.7e308]
    for x in (wide, near, sums, torch.tensor(few, dtype=torch.float64)):
        exact = np.log(x.numpy().astype(np.longdouble))
        assert ulps(torch.ops.rlir._log(x), exact) < 2.0
    special = torch.ops.rlir._log(torch.tensor([0.0, -1.0, torch.inf, torch.nan, 1.0]).double())
    assert special[0].isneginf()
    assert special[1].isnan()
    assert special[2].isposinf()
    assert special[3].isnan()
    assert special[4].item() == 0
