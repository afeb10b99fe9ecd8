"""policy_loss forward and backward against TRL's loss, eager and compiled, by turns.

    python benchmarks/bench_policy_loss.py [--rounds 31] [--threads N] [--no-compile]

The peers are TRL's lines (1.16, GRPOTrainer._compute_loss from the log-probabilities to the loss),
with and without the clip metrics that it logs; the op computes its statistics in every case. The
limit is moving the bytes that must move (inputs read forward and backward, the gradient written)
at the speed of a copy of the same arrays, in the same run.
"""

import argparse
from collections.abc import Callable
from functools import partial

import torch
from harness import emit, interleave, machine, table
from torch import Tensor

from rlir.ops import policy_loss, policy_loss_reference

LOW, HIGH, BETA = 0.2, 0.28, 0.04


def trl(
    p: Tensor,
    old: Tensor,
    a: Tensor,
    ref: Tensor | None,
    mask: Tensor,
    level: str,
    metrics: bool,
) -> tuple[Tensor, list[Tensor]]:
    """TRL's lines for loss_type "grpo"."""
    advantages = a.unsqueeze(1)
    log_ratio = p - old
    if level == "token":
        weights = log_ratio
    else:
        weights = (log_ratio * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)
        weights = weights.unsqueeze(-1)
    coef_1 = torch.exp(weights)
    coef_2 = torch.clamp(coef_1, 1 - LOW, 1 + HIGH)
    per_token = -torch.min(coef_1 * advantages, coef_2 * advantages)
    if ref is not None:
        kl = torch.exp(ref - p) - (ref - p) - 1
        per_token = per_token + BETA * kl
    loss = ((per_token * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).mean()
    seen = []
    if metrics:
        with torch.no_grad():
            low = (coef_1 < 1 - LOW) & (advantages < 0)
            high = (coef_1 > 1 + HIGH) & (advantages > 0)
            for x in (low.float(), high.float(), (low | high).float()):
                seen.append((x * mask).sum() / mask.sum().clamp(min=1.0))
                seen.append((x * mask).sum(-1) / mask.sum(-1))
            if ref is not None:
                seen.append((kl * mask).sum() / mask.sum().clamp(min=1.0))
    return loss, seen


def both(leaf: Tensor, forward: Callable[[], tuple[Tensor, object]]) -> None:
    """Forward and backward; the gradient is let go, as the next layer's backward would."""
    loss, _ = forward()
    torch.autograd.grad(loss, leaf)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--no-compile", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    where = machine()
    print("  ".join(f"{k} {v}" for k, v in where.items()))

    rows, results = [], []
    compiled = torch.compile(trl, dynamic=False)
    cases = [
        (16, 5376, "token", False),
        (16, 5376, "token", True),
        (16, 5376, "sequence", True),
        (8, 512, "token", True),
    ]
    for b, t, level, with_ref in cases:
        g = torch.Generator().manual_seed(0)
        p = -3 * torch.rand(b, t, generator=g)
        old = p + 0.2 * torch.randn(b, t, generator=g)
        ref = p + 0.3 * torch.randn(b, t, generator=g) if with_ref else None
        a = torch.randn(b, generator=g)
        lengths = torch.randint(t // 2, t + 1, (b, 1), generator=g)
        mask = torch.arange(t) < lengths
        number = mask.long()
        leaf = p.clone().requires_grad_()
        target = torch.empty_like(p)
        settings = {
            "ref_logprob": ref,
            "mask": mask,
            "importance_level": level,
            "clip_low": LOW,
            "clip_high": HIGH,
            "kl_weight": BETA if with_ref else 0.0,
        }
        calls: dict[str, Callable[[], object]] = {
            "rlir": partial(both, leaf, partial(policy_loss, leaf, old, a, **settings)),
            "TRL eager": partial(both, leaf, partial(trl, leaf, old, a, ref, number, level, False)),
            "TRL eager, metrics": partial(
                both, leaf, partial(trl, leaf, old, a, ref, number, level, True)
            ),
            "reference": partial(
                both, leaf, partial(policy_loss_reference, leaf, old, a, **settings)
            ),
            "copy": partial(target.copy_, p),
        }
        if not options.no_compile:
            calls["TRL compiled"] = partial(
                both, leaf, partial(compiled, leaf, old, a, ref, number, level, False)
            )
        times = interleave(calls, options.rounds)
        with torch.inference_mode():
            times |= {
                f"rlir {k}": v
                for k, v in interleave(
                    {"forward only": partial(policy_loss, p, old, a, **settings)}, options.rounds
                ).items()
            }
        arrays = 3 if with_ref else 2
        moved = 2 * (arrays * 4 + 1) * b * t + 4 * b * t  # read twice, and the gradient written
        floor = times["copy"] * moved / (8 * b * t)
        wide = [x.double() if x is not None else None for x in (p, old, a, ref)]
        truth = trl(*wide, number, level, False)[0]
        error = float((policy_loss(p, old, a, **settings)[0].double() - truth).abs())
        name = f"{b} x {t} {level}{', KL' if with_ref else ''}"
        for who, seconds in times.items():
            rows.append(
                (
                    f"{name}  {who}",
                    f"{seconds * 1e6:.0f}",
                    f"{times['TRL eager'] / seconds:.2f}",
                    f"{100 * floor / seconds:.0f}" if who == "rlir" else "",
                )
            )
        results.append(
            {
                "shape": [b, t],
                "level": level,
                "kl": with_ref,
                "bytes": moved,
                "microseconds": {k: round(v * 1e6, 2) for k, v in times.items()},
                "times_trl_eager": round(times["TRL eager"] / times["rlir"], 2),
                "percent_of_limit": round(100 * floor / times["rlir"], 1),
                "loss_error_against_float64": error,
            }
        )
    header = ("float32, rows x tokens", "us", "x TRL eager", "% of limit")
    print(table(header, rows))
    emit("policy_loss", {"machine": where, "results": results})


if __name__ == "__main__":
    main()
