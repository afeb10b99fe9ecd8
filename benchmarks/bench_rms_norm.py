"""rms_norm against torch, forward and backward, in one process, by turns.

    python benchmarks/bench_rms_norm.py [--rounds 31] [--threads N]

The limit is a copy of what must be read and written.
"""

import torch
from row_bench import compare
from torch import Tensor

from rlir.ops import rms_norm

SHAPES = ((5360, 256, torch.bfloat16), (5376, 1024, torch.bfloat16), (5360, 256, torch.float32))


def make(n: int, size: int, dtype: torch.dtype) -> tuple[dict, tuple[Tensor, ...], Tensor]:
    x = torch.randn(n, size).to(dtype).requires_grad_()
    weight = torch.ones(size, requires_grad=True)

    def eager() -> Tensor:
        return torch.nn.functional.rms_norm(x, weight.shape, weight.to(x.dtype), 1e-5)

    calls = {"rlir": lambda: rms_norm(x, weight), "torch": eager}
    return calls, (x, weight), torch.randn(n, size).to(dtype)


if __name__ == "__main__":
    compare("rms_norm", __doc__.splitlines()[0], SHAPES, make, (1.0, 2.5))
