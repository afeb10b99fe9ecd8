"""What the tests of group_advantage share: the formula in extended precision, inputs, digests.

Run as a program with a number of threads, this file prints digests of the kernel's bits over many
inputs; the tests run it under every instruction set.
"""

import hashlib
import json
import sys
from itertools import product

import numpy as np
import torch
from torch import Tensor

from rlir import _build_info
from rlir.ops import group_advantage

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SCALES = ("group", "batch", "none")
BASELINES = ("mean", "leave_one_out")


def exact(
    rewards: Tensor,
    ids: Tensor,
    mask: Tensor | None = None,
    *,
    scale: str = "group",
    baseline: str = "mean",
    eps: float = 1e-4,
    clip: float | None = None,
    unbiased: bool = True,
) -> np.ndarray:
    """The formula, row by row in extended precision: longdouble, the shape of ``rewards``."""
    r = rewards.double().numpy().astype(np.longdouble).reshape(-1)
    counts = np.isfinite(r)
    if mask is not None:
        counts &= mask.numpy().reshape(-1)
    groups = ids.numpy().reshape(-1)
    ddof = int(unbiased)
    out = np.zeros_like(r)
    for i in np.flatnonzero(counts):
        group = r[counts & (groups == groups[i])]
        if (group == group[0]).all():
            continue
        others = counts & (groups == groups[i])
        others[i] = baseline == "mean"
        spread_of = {"group": group, "batch": r[counts]}.get(scale)
        divisor = 1 if spread_of is None else spread_of.std(ddof=ddof) + np.longdouble(eps)
        out[i] = (r[i] - r[others].mean()) / divisor
    if clip is not None:
        out = out.clip(-clip, clip)
    return out.reshape(rewards.shape)


def assert_close(got: Tensor, peer: Tensor, truth: np.ndarray) -> None:
    """At most twice the error of PyTorch in the same dtype, plus one ulp of the largest value."""
    assert got.shape == truth.shape
    assert got.dtype == peer.dtype
    assert got.isfinite().all()
    if not got.numel():
        return
    error = np.abs(got.double().numpy() - truth).max()
    allowed = 2 * np.abs(peer.double().numpy() - truth).max()
    ulp = torch.finfo(got.dtype).eps * max(np.abs(truth).max(), torch.finfo(got.dtype).tiny)
    assert error <= allowed + ulp, f"error {error}, allowed 2 x {allowed / 2} + {ulp}"


def restride(x: Tensor, kind: str) -> Tensor:
    """The same values under other strides."""
    if kind == "step":
        wide = torch.zeros(*x.shape[:-1], x.shape[-1] * 3 + 1, dtype=x.dtype)[..., 1::3]
        return wide.copy_(x)
    if kind == "transposed" and x.dim() == 2:
        return x.t().contiguous().t()
    if kind == "column":
        return torch.stack([x, x, x], dim=-1)[..., 1]
    return x.contiguous()


def sample(
    groups: int, members: int, dtype: torch.dtype, seed: int = 0, *, nan: float = 0.0
) -> Tensor:
    """Rewards [groups, members]: some groups tied, offset or tiny; ``nan`` of them not finite."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(groups, members, generator=g, dtype=torch.float64)
    kind = torch.randint(0, 4, (groups, 1), generator=g)
    x = torch.where(kind == 1, x.round(), x)
    x = torch.where(kind == 2, x * 0.1 + 40.0, x)
    x = torch.where(kind == 3, x.sign() * 0.1, x)
    lost = torch.rand(groups, members, generator=g) < nan
    values = torch.tensor([torch.nan, torch.inf, -torch.inf], dtype=torch.float64)
    return x.where(~lost, values[torch.randint(0, 3, x.shape, generator=g)]).to(dtype)


def rows_to_groups(groups: int, members: int) -> Tensor:
    return torch.arange(groups)[:, None].expand(groups, members)


def digests() -> dict[str, str]:
    """Digests of the kernel's bits over dtypes, sizes, layouts and options."""
    found = {}
    for dtype, scale, baseline in product(DTYPES, SCALES, BASELINES):
        digest = hashlib.sha256()
        for members in (1, 2, 7, 16, 33, 257, 4099):
            r = sample(max(3, 40000 // members), members, dtype, seed=members, nan=0.05)
            g = torch.Generator().manual_seed(members)
            ids = torch.randint(0, 50, (r.numel(),), generator=g)
            for out in (
                group_advantage(r, scale=scale, baseline=baseline),
                group_advantage(r.flatten(), ids, scale=scale, baseline=baseline, clip=2.0),
            ):
                digest.update(out.flatten().view(torch.uint8).numpy().tobytes())
        found[f"{dtype} {scale} {baseline}"] = digest.hexdigest()
    return found


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[1]))
    print(json.dumps({**digests(), "isa": _build_info.used_cpu_isa()}))
