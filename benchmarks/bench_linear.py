"""linear against torch, forward and backward, in one process, by turns.

    python benchmarks/bench_linear.py [--rounds 15] [--threads N] [--cpu-time]

Shapes: the Doom model's layers on 16 clips of 343 positions, MineWorld-300M's on 4 frames. The
limit is the larger of both candidates' rates on a product of 1536 x 1536 x 1536.
"""

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from harness import emit, interleave, machine, table

from rlir.ops import linear

Call = Callable[[], object]

DOOM = ((5488, 256, 512), (5488, 256, 256), (5488, 256, 1408), (5488, 704, 256))
MINEWORLD = ((1388, 1024, 1536), (1388, 1024, 1024), (1388, 1024, 8192), (1388, 4096, 1024))
FEW = ((16, 256, 1408), (1, 1024, 8192))


def candidates(n: int, k: int, o: int, dtype: torch.dtype) -> dict[str, dict[str, Call]]:
    """Forward and both ways, by name."""
    x, weight = torch.randn(n, k).to(dtype), torch.randn(o, k).to(dtype)
    grad = torch.randn(n, o).to(dtype)
    leaves = (x.requires_grad_(), weight.requires_grad_())
    calls = {"rlir": linear, "torch": F.linear}
    forward = {name: lambda f=f: f(x.detach(), weight.detach()) for name, f in calls.items()}
    both = {
        name: lambda f=f: torch.autograd.grad(f(*leaves), leaves, grad) for name, f in calls.items()
    }
    return {"forward": forward, "both ways": both}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--cpu-time", action="store_true", help="processor time, for a busy machine and one thread"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = time.process_time if options.cpu_time else time.perf_counter
    where = {**machine(), "clock": clock.__name__}
    print("  ".join(f"{k} {v}" for k, v in where.items()))
    rows, results = [], []
    for dtype in (torch.bfloat16, torch.float32):
        ways = candidates(1536, 1536, 1536, dtype)
        times = interleave(ways["forward"], options.rounds, warmup=3, clock=clock)
        limit = 1536**3 / min(times.values())  # multiply-adds a second
        for n, k, o in (*DOOM, *MINEWORLD, *FEW):
            ways = candidates(n, k, o, dtype)
            for way, calls in ways.items():
                times = interleave(calls, options.rounds, warmup=3, clock=clock)
                work = n * k * o * (1 if way == "forward" else 3)
                share = 100 * work / limit / times["rlir"]
                rows.append(
                    (
                        f"[{n}, {k}] to {o}, {str(dtype).removeprefix('torch.')}, {way}",
                        *(f"{times[name] * 1e3:.2f}" for name in ("rlir", "torch")),
                        f"{times['torch'] / times['rlir']:.2f}",
                        f"{share:.0f}",
                    )
                )
                results.append(
                    {
                        "shape": [n, k, o],
                        "dtype": str(dtype),
                        "what": way,
                        "milliseconds": {c: round(t * 1e3, 3) for c, t in times.items()},
                        "limit_share": round(share / 100, 3),
                    }
                )
    print(table(("ms", "rlir", "torch", "x torch", "% of limit"), rows))
    emit("linear", {"machine": where, "results": results})


if __name__ == "__main__":
    main()
