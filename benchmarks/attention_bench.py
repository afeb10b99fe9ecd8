"""What the benchmarks of attention share: options, this machine's limits, peers, the table.

The limit of a call is the larger of its products' time at the rate of a large bfloat16 product and
of its bytes' time at the rate of a copy, both measured in the same run.
"""

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from harness import emit, interleave, machine, table
from torch import Tensor

Call = Callable[[], object]
SQUARE, COPIED = 1536, 1 << 26


@dataclass
class Bench:
    """Collects cases; ``run`` times one against its peers, ``finish`` prints."""

    op: str
    what: str
    rounds: int = 7
    rows: list[tuple] = field(default_factory=list)
    results: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        parser = argparse.ArgumentParser(description=self.what)
        parser.add_argument("--rounds", type=int, default=self.rounds)
        parser.add_argument("--threads", type=int, default=torch.get_num_threads())
        parser.add_argument("--no-compile", action="store_true", help="leave out FlexAttention")
        parser.add_argument(
            "--cpu-time", action="store_true", help="processor time: a busy machine, one thread"
        )
        options = parser.parse_args()
        torch.set_num_threads(options.threads)
        torch.manual_seed(0)
        self.rounds, self.compiles = options.rounds, not options.no_compile
        self.clock = time.process_time if options.cpu_time else time.perf_counter
        self.where = {**machine(), "clock": self.clock.__name__}
        print("  ".join(f"{k} {v}" for k, v in self.where.items()))
        a, source = torch.randn(SQUARE, SQUARE).bfloat16(), torch.empty(COPIED, dtype=torch.uint8)
        target = torch.empty_like(source)
        times = self.times({"mm": lambda: torch.mm(a, a), "copy": lambda: target.copy_(source)}, 11)
        self.flops = 2 * SQUARE**3 / times["mm"]
        self.bytes = 2 * COPIED / times["copy"]
        print(f"{self.flops / 1e9:.0f} GFLOP/s bfloat16, {self.bytes / 1e9:.1f} GB/s copied")

    def times(self, calls: Mapping[str, Call], rounds: int | None = None) -> dict[str, float]:
        return interleave(calls, rounds or self.rounds, seconds=0.01, warmup=1, clock=self.clock)

    def run(self, name: str, calls: Mapping[str, Call], flops: float, moved: float) -> None:
        """``calls`` holds "rlir" and its peers; others are compared with the fastest peer."""
        times = self.times(calls)
        peers = {k: t for k, t in times.items() if k != "rlir"}
        best = min(peers, key=peers.__getitem__)
        limit = max(flops / self.flops, moved / self.bytes)
        ours = times["rlir"]
        listed = ", ".join(f"{k} {t * 1e3:.2f}" for k, t in peers.items())
        self.rows.append(
            (name, f"{ours * 1e3:.2f}", listed, f"{peers[best] / ours:.2f}",
             f"{100 * limit / ours:.0f}")
        )  # fmt: skip
        self.results.append(
            {
                "case": name,
                "milliseconds": {k: round(t * 1e3, 3) for k, t in times.items()},
                "times_fastest_peer": round(peers[best] / ours, 3),
                "limit_share": round(limit / ours, 3),
            }
        )

    def finish(self, **more: Any) -> None:
        print(table(("case", "rlir ms", "peers ms", "x best", "% of limit"), self.rows))
        emit(self.op, {"machine": self.where, "results": self.results, **more})


def bfloat16(*shape: int) -> Tensor:
    return torch.randn(shape).bfloat16()


def heads_first(x: Tensor) -> Tensor:
    """[B, T, H, D] as torch's kernels want it."""
    return x.transpose(1, 2).contiguous()


def expanded(x: Tensor, heads: int) -> Tensor:
    """Key heads copied to every query head, [B, H, T, D]."""
    return x.repeat_interleave(heads // x.shape[1], 1)


def sdpa(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, **options)


def both_ways(call: Callable[..., Tensor], leaves: Sequence[Tensor], grad: Tensor) -> Call:
    given = [x.detach().requires_grad_() for x in leaves]
    return lambda: torch.autograd.grad(call(*given), given, grad)
