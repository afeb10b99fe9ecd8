"""rotary against torch, forward and backward, in one process, by turns.

    python benchmarks/bench_rotary.py [--rounds 31] [--threads N]

torch is x * cos + turned * sin, in x's dtype, as Llama models have it. The limit is a copy of what
must be read and written. Shapes are tokens and heads of 64 side by side.
"""

import torch
from row_bench import compare
from torch import Tensor

from rlir.ops import rotary

SHAPES = (
    (5552, 1024, torch.bfloat16),
    (5552, 1024, torch.float32),
    (1388, 1280, torch.bfloat16),
)


def make(n: int, size: int, dtype: torch.dtype) -> tuple[dict, tuple[Tensor, ...], Tensor]:
    x = torch.randn(n, size).to(dtype).requires_grad_()
    angle = torch.arange(n)[:, None] * 10000 ** (-torch.arange(0, 64, 2) / 64)
    angle = torch.cat([angle, angle], -1)
    cos, sin = angle.cos(), angle.sin()
    low_cos, low_sin = (y.to(dtype)[:, None] for y in (cos, sin))

    def eager() -> Tensor:
        heads = x.view(1, n, -1, 64)
        turned = torch.cat([-heads[..., 32:], heads[..., :32]], -1)
        return (heads * low_cos + turned * low_sin).view(n, size)

    def ours() -> Tensor:
        return rotary(x.view(1, n, -1, 64), cos, sin).view(n, size)

    return {"rlir": ours, "torch": eager}, (x,), torch.randn(n, size).to(dtype)


if __name__ == "__main__":
    compare("rotary", __doc__.splitlines()[0], SHAPES, make, (1.0, 2.0))
