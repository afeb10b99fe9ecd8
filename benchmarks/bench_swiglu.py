"""swiglu against torch, forward and backward, in one process, by turns.

    python benchmarks/bench_swiglu.py [--rounds 31] [--threads N]

The limit is a copy of what must be read and written.
"""

import torch
from row_bench import compare
from torch import Tensor

from rlir.ops import swiglu

SHAPES = ((5360, 704, torch.bfloat16), (5376, 4096, torch.bfloat16), (5360, 704, torch.float32))


def make(n: int, size: int, dtype: torch.dtype) -> tuple[dict, tuple[Tensor, ...], Tensor]:
    both_halves = torch.randn(n, 2 * size).to(dtype).requires_grad_()

    def eager() -> Tensor:
        gate, up = both_halves.chunk(2, -1)
        return torch.nn.functional.silu(gate) * up

    calls = {"rlir": lambda: swiglu(both_halves), "torch": eager}
    return calls, (both_halves,), torch.randn(n, size).to(dtype)


if __name__ == "__main__":
    compare("swiglu", __doc__.splitlines()[0], SHAPES, make, (1.5, 4.0))
