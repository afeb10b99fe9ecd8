"""Ops on rows against torch: the loop that bench_rms_norm and bench_swiglu share."""

import argparse
from collections.abc import Callable, Mapping, Sequence

import torch
from harness import emit, interleave, machine, table
from torch import Tensor

Shape = tuple[int, int, torch.dtype]
Make = Callable[..., tuple[Mapping[str, Callable[[], Tensor]], tuple[Tensor, ...], Tensor]]
"""Candidates by name, the leaves that they have gradients of, and the gradient that arrives."""


def compare(op: str, what: str, shapes: Sequence[Shape], make: Make, passes: tuple) -> None:
    """Time ``make(rows, size, dtype)``'s candidates, forward and both ways. ``passes``: how often
    what a copy moves, in either case, is what must be read and written.
    """
    parser = argparse.ArgumentParser(description=what)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    where = machine()
    print("  ".join(f"{k} {v}" for k, v in where.items()))
    rows, results = [], []
    for n, size, dtype in shapes:
        calls, leaves, grad = make(n, size, dtype)
        target = torch.empty_like(grad)
        both = {
            name: lambda f=f, x=leaves, g=grad: torch.autograd.grad(f(), x, g)
            for name, f in calls.items()
        }
        copy = {"copy": lambda x=grad, t=target: t.copy_(x)}
        for way, candidates, moved in (
            ("forward", calls, passes[0]),
            ("both ways", both, passes[1]),
        ):
            times = interleave({**candidates, **copy}, options.rounds)
            limit, ours = moved * times["copy"], times["rlir"]
            rows.append(
                (
                    f"[{n}, {size}] {str(dtype).removeprefix('torch.')}, {way}",
                    *(f"{times[name] * 1e6:.0f}" for name in ("rlir", "torch", "copy")),
                    f"{times['torch'] / ours:.2f}",
                    f"{100 * limit / ours:.0f}",
                )
            )
            results.append(
                {
                    "shape": [n, size],
                    "dtype": str(dtype),
                    "what": way,
                    "microseconds": {k: round(t * 1e6, 1) for k, t in times.items()},
                }
            )
    print(table(("us", "rlir", "torch", "copy", "x torch", "% of limit"), rows))
    emit(op, {"machine": where, "results": results})
