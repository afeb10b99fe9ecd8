"""What the tests of policy_loss share: the formula in extended precision, inputs, digests.

Run as a program with a number of threads, this file prints digests of the kernel's bits over many
inputs; the tests run it under every instruction set.
"""

import hashlib
import json
import sys
from contextlib import nullcontext
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlir import _build_info
from rlir.ops import PolicyLossStatistics, policy_loss

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LOSS_TYPES = ("grpo", "dr_grpo", "bnpo", "dapo", "cispo")
LEVELS = ("token", "sequence")
ESTIMATORS = ("k1", "k2", "k3")
FIELDS = tuple(PolicyLossStatistics.__dataclass_fields__)


def sample(b: int, t: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, Tensor]:
    """Log-probabilities that differ enough to be clipped on both sides, advantages, a mask."""
    g = torch.Generator().manual_seed(seed)

    def normal(scale: float) -> Tensor:
        return scale * torch.randn(b, t, generator=g, dtype=torch.float64)

    p = -torch.rand(b, t, generator=g, dtype=torch.float64) * 4
    row = 0.3 * torch.randn(b, 1, generator=g, dtype=torch.float64)
    old = p + normal(0.3) + row
    x = {
        "logprob": p,
        "old_logprob": old,
        "advantages": normal(1.0),
        "ref_logprob": p + normal(0.7),
        "rollout_logprob": old + normal(0.2),
    }
    mask = torch.rand(b, t, generator=g) < 0.8
    return {**{k: v.to(dtype) for k, v in x.items()}, "mask": mask}


def apart(x: dict[str, Tensor], clip_low: float, clip_high: float, delta: float | None) -> Tensor:
    """A mask without tokens whose ratio is within rounding of where the gradient jumps."""
    ratio = (x["logprob"].double() - x["old_logprob"].double()).exp()
    near = torch.zeros_like(x["mask"])
    for edge in (1 - clip_low, 1 + clip_high, clip_high, delta):
        if edge is not None:
            near |= (ratio - edge).abs() < 1e-5
    return x["mask"] & ~near


def exact(
    x: dict[str, Tensor],
    *,
    loss_type: str = "grpo",
    importance_level: str = "token",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    delta: float | None = None,
    kl_weight: float = 0.0,
    kl_estimator: str = "k3",
    kl_importance: bool = False,
    truncated_importance: float | None = None,
    normalizer: float | None = None,
    max_length: int | None = None,
) -> tuple[np.longdouble, np.ndarray, dict[str, np.longdouble]]:
    """Loss, gradient and statistics in extended precision, token by token, by hand."""
    wide = {k: v.double().numpy().astype(np.longdouble) for k, v in x.items() if k != "mask"}
    p, o, a = wide["logprob"], wide["old_logprob"], wide["advantages"]
    q, u = wide.get("ref_logprob"), wide.get("rollout_logprob")
    b, t = p.shape
    m = x["mask"].numpy() if "mask" in x else np.ones((b, t), bool)
    cispo, sequence = loss_type == "cispo", importance_level == "sequence"
    low, high = (-np.inf, clip_high) if cispo else (1 - clip_low, 1 + clip_high)
    cap = np.inf if delta is None or cispo else delta
    n = m.sum(1)
    total = max(int(n.sum()), 1)
    divide = {"grpo": b, "bnpo": total, "dr_grpo": b * (max_length or t)}.get(
        loss_type, normalizer or total
    )
    zero, one = np.longdouble(0), np.longdouble(1)
    loss, gradient = zero, np.zeros((b, t), np.longdouble)
    weights = {"all": [], "ratio": []}
    seen: dict[str, list] = {name: [] for name in FIELDS}
    for i in range(b):
        if n[i] == 0:
            continue
        own = divide * (n[i] if loss_type == "grpo" else 1)
        mean = sum(p[i, j] - o[i, j] for j in range(t) if m[i, j]) / n[i]
        for j in range(t):
            if not m[i, j]:
                continue
            c = np.exp(mean if sequence else p[i, j] - o[i, j])
            clipped = min(max(c, low), high)
            v = one if u is None else min(np.exp(o[i, j] - u[i, j]), truncated_importance)
            if cispo:
                gain, slope = clipped * a[i, j] * p[i, j], clipped * a[i, j]
                gradient[i, j] -= v * slope / own
            else:
                first, second = min(c, cap) * a[i, j], clipped * a[i, j]
                gain = min(first, second)
                passes = c <= cap if first <= second else low <= c <= high
                slope = c * a[i, j] if passes else zero
                if sequence:
                    gradient[i, m[i]] -= v * slope / n[i] / own
                else:
                    gradient[i, j] -= v * slope / own
            kl = zero
            if q is not None:
                d = q[i, j] - p[i, j]
                kl = {"k1": -d, "k2": d * d / 2, "k3": np.expm1(d) - d}[kl_estimator]
                dkl = {"k1": one, "k2": -d, "k3": -np.expm1(d)}[kl_estimator]
                if kl_importance:
                    kl, dkl = kl * c, dkl * c
                    through = m[i] if sequence else j  # the ratio, to all tokens of its mean
                    gradient[i, through] += kl_weight * kl / (n[i] if sequence else 1) / own
                gradient[i, j] += kl_weight * dkl / own
            loss += (kl_weight * kl - v * gain) / own
            weights["all"].append(1)
            weights["ratio"].append(one / n[i] if sequence else one)
            for name, value in (
                ("kl", kl),
                ("old_kl", o[i, j] - p[i, j]),
                ("ratio", c),
                ("ess", c * c),
                ("clipped_low", c < low and a[i, j] < 0),
                ("clipped_high", c > high and a[i, j] > 0),
                ("clipped_delta", c > cap and a[i, j] < 0),
                ("outside", c < low or c > high),
                ("importance", v),
                ("truncated", v == truncated_importance),
            ):
                seen[name].append(value)
    if not weights["all"]:
        return loss, gradient, dict.fromkeys(FIELDS, zero)
    of_token = {"kl", "old_kl", "importance", "truncated"}
    found = {
        name: np.average(values, weights=weights["all" if name in of_token else "ratio"])
        for name, values in seen.items()
        if values
    }
    found["ess"] = found["ratio"] ** 2 / found["ess"]
    found["tokens"] = np.longdouble(len(weights["all"]))
    found["ratio_min"], found["ratio_max"] = min(seen["ratio"]), max(seen["ratio"])
    return loss, gradient, found


def call(op: Any, x: dict[str, Tensor], **options: Any) -> tuple[Tensor, Tensor, dict]:
    """Loss, gradient and statistics (those that are there) of an op."""
    x = dict(x)
    leaf = x.pop("logprob").detach().requires_grad_()
    with op.active() if hasattr(op, "active") else nullcontext():
        loss, seen = op(leaf, x.pop("old_logprob"), x.pop("advantages"), **x, **options)
        loss.backward()
    found = {k: v for k in FIELDS if (v := getattr(seen, k)) is not None}
    return loss.detach(), leaf.grad, found


def digests() -> dict[str, str]:
    """Digests of the kernel's bits over dtypes, losses and sizes."""
    found = {}
    for dtype, loss_type, level in product(DTYPES[1:], LOSS_TYPES, LEVELS):
        digest = hashlib.sha256()
        for t, estimator in ((1, "k1"), (7, "k2"), (256, "k3"), (333, "k3"), (5001, "k3")):
            x = sample(8 if t == 5001 else 2000 // t, t, dtype, seed=t)  # the last: several threads
            options = {"kl_weight": 0.1, "kl_estimator": estimator, "truncated_importance": 1.1}
            options["kl_importance"] = t == 333
            loss, gradient, seen = call(
                policy_loss, x, loss_type=loss_type, importance_level=level, delta=1.5, **options
            )
            for out in (loss, gradient, *seen.values()):
                digest.update(out.flatten().view(torch.uint8).numpy().tobytes())
        found[f"{dtype} {loss_type} {level}"] = digest.hexdigest()
    return found


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[1]))
    print(json.dumps({**digests(), "isa": _build_info.used_cpu_isa()}))
