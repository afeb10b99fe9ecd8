"""rms_norm against torch, forward and backward, in one process, by turns.

    python benchmarks/bench_rms_norm.py [--rounds 31] [--threads N]

The limit is a copy of what must be read and written.
"""

import argparse

import torch
from harness import emit, interleave, machine, table

from rlir.ops import rms_norm

SHAPES = ((5360, 256, torch.bfloat16), (5376, 1024, torch.bfloat16), (5360, 256, torch.float32))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    where = machine()
    print("  ".join(f"{k} {v}" for k, v in where.items()))
    rows, results = [], []
    for n, size, dtype in SHAPES:
        x = torch.randn(n, size).to(dtype).requires_grad_()
        weight, grad = torch.ones(size, requires_grad=True), torch.randn(n, size).to(dtype)
        target = torch.empty_like(grad)
        calls = {
            "rlir": lambda x=x, w=weight: rms_norm(x, w),
            "torch": lambda x=x, w=weight: torch.nn.functional.rms_norm(
                x, w.shape, w.to(x.dtype), 1e-5
            ),
        }
        both = {
            name: lambda f=f, x=x, w=weight, g=grad: torch.autograd.grad(f(), (x, w), g)
            for name, f in calls.items()
        }
        copy = {"copy": lambda x=grad, t=target: t.copy_(x)}
        for what, candidates, passes in (("forward", calls, 1.0), ("both ways", both, 2.5)):
            times = interleave({**candidates, **copy}, options.rounds)
            limit, ours = passes * times["copy"], times["rlir"]
            rows.append(
                (
                    f"[{n}, {size}] {str(dtype).removeprefix('torch.')}, {what}",
                    *(f"{times[name] * 1e6:.0f}" for name in ("rlir", "torch", "copy")),
                    f"{times['torch'] / ours:.2f}",
                    f"{100 * limit / ours:.0f}",
                )
            )
            results.append(
                {
                    "shape": [n, size],
                    "dtype": str(dtype),
                    "what": what,
                    "microseconds": {k: round(t * 1e6, 1) for k, t in times.items()},
                }
            )
    print(table(("us", "rlir", "torch", "copy", "x torch", "% of limit"), rows))
    emit("rms_norm", {"machine": where, "results": results})


if __name__ == "__main__":
    main()
