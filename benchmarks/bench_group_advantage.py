"""group_advantage against the eager PyTorch formula, in one process, by turns.

    python benchmarks/bench_group_advantage.py [--rounds 31] [--threads N]

The first size is what a GRPO step has (64 groups of 16): there the time is calls, not
arithmetic, so the limit is an empty call of the operator. The last is large: there the limit is
reading rewards and writing advantages at the speed of a copy.
"""

import argparse

import torch
from harness import emit, interleave, machine, table
from torch import Tensor

from rlir.ops import group_advantage, group_advantage_reference

EPS = 1e-4


def trl(r: Tensor) -> Tensor:
    """TRL's lines, on groups of equal size."""
    mean = r.mean(dim=1, keepdim=True)
    std = r.std(dim=1, keepdim=True)
    return (r - mean) / (std + EPS)


def trl_clipped_nan_safe(r: Tensor) -> Tensor:
    """The same in eager PyTorch with what group_advantage also does: NaN, no spread, clip."""
    ok = ~r.isnan()
    count = ok.sum(1, keepdim=True)
    x = r.where(ok, 0)
    d = (x - x.sum(1, keepdim=True) / count.clamp(min=1)).where(ok, 0)
    std = (d.square().sum(1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
    spread = r.where(ok, -torch.inf).amax(1) > r.where(ok, torch.inf).amin(1)
    return (d / (std + EPS)).where(spread[:, None], 0).clamp(-5, 5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    where = machine()
    print("  ".join(f"{k} {v}" for k, v in where.items()))

    rows, results = [], []
    empty = torch.zeros(0, 16)
    for groups, members in ((64, 16), (1024, 16), (65536, 16)):
        g = torch.Generator().manual_seed(0)
        r = torch.randn(groups, members, generator=g)
        ids = torch.randperm(groups * members, generator=g) // members
        flat, target = r.flatten(), torch.empty_like(r)
        with torch.inference_mode():
            times = interleave(
                {
                    "rlir": lambda r=r: group_advantage(r, clip=5.0),
                    "eager TRL": lambda r=r: trl(r),
                    "eager, same guards": lambda r=r: trl_clipped_nan_safe(r),
                    "rlir, by ids": lambda f=flat, i=ids: group_advantage(f, i, clip=5.0),
                    "reference, by ids": lambda f=flat, i=ids: group_advantage_reference(
                        f, i, clip=5.0
                    ),
                    "copy": lambda r=r, t=target: t.copy_(r),
                    "empty call": lambda: group_advantage(empty, clip=5.0),
                },
                options.rounds,
            )
        bytes_moved = 2 * r.numel() * r.element_size()
        floor = max(times["copy"], times["empty call"])
        truth = trl(r.double())
        error = float((group_advantage(r).double() - truth).abs().max())
        for name, seconds in times.items():
            rows.append(
                (
                    f"{groups} x {members}  {name}",
                    f"{seconds * 1e6:.1f}",
                    f"{bytes_moved / seconds / 1e9:.2f}" if name != "empty call" else "",
                    f"{times['eager TRL'] / seconds:.2f}",
                    f"{100 * floor / seconds:.0f}",
                )
            )
        results.append(
            {
                "groups": groups,
                "members": members,
                "microseconds": {k: round(v * 1e6, 2) for k, v in times.items()},
                "percent_of_limit": round(100 * floor / times["rlir"], 1),
                "max_error_against_float64": error,
            }
        )
    header = ("float32, groups x members", "us", "GB/s", "x eager TRL", "% of limit")
    print(table(header, rows))
    emit("group_advantage", {"machine": where, "results": results})


if __name__ == "__main__":
    main()
