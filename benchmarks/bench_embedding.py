"""embedding against torch, forward and backward, in one process, by turns.

    python benchmarks/bench_embedding.py [--rounds 31] [--threads N]

A row of the table below is [rows, size] of a table of 1051 rows (the Doom model's). The limit is a
copy of what must be read and written: both ways also the table's gradient.
"""

import torch
import torch.nn.functional as F
from row_bench import compare
from torch import Tensor

from rlir.ops import embedding

TABLE = 1051
SHAPES = ((5360, 256, torch.float32), (5376, 1024, torch.float32), (5360, 256, torch.bfloat16))


def make(n: int, size: int, dtype: torch.dtype) -> tuple[dict, tuple[Tensor, ...], Tensor]:
    ids = torch.randint(TABLE, (n,))
    weight = torch.randn(TABLE, size).to(dtype).requires_grad_()
    calls = {"rlir": lambda: embedding(ids, weight), "torch": lambda: F.embedding(ids, weight)}
    return calls, (weight,), torch.randn(n, size).to(dtype)


if __name__ == "__main__":
    compare("embedding", __doc__.splitlines()[0], SHAPES, make, (1.0, 1.6))
