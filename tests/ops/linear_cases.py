"""What the tests of linear share; as a program with a number of threads, digests of bits."""

import hashlib
import json
import sys
from collections.abc import Sequence

import torch
from row_cases import normal, with_gradients
from torch import Tensor

from rlir import _build_info
from rlir.ops import embedding, linear

# Rows, inputs, outputs: whole panels and not, chains of 128 and more, odd depths.
SIZES = ((70, 256, 96), (33, 301, 50), (1, 7, 3), (300, 64, 129), (16, 1100, 17))


def operands(
    n: int, k: int, o: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, ...]:
    """x [n, k], weight [o, k], bias [o] and the gradient [n, o]."""
    x, weight = normal(n, k, dtype=dtype, seed=seed), normal(o, k, dtype=dtype, seed=seed + 1)
    return x, weight, normal(o, seed=seed + 2), normal(n, o, dtype=dtype, seed=seed + 3)


def main() -> None:
    torch.set_num_threads(int(sys.argv[1]))
    found = {"isa": _build_info.used_cpu_isa()}

    def note(name: str, tensors: Sequence[Tensor]) -> None:
        data = b"".join(x.contiguous().view(torch.uint8).numpy().tobytes() for x in tensors)
        found[name] = hashlib.sha256(data).hexdigest()

    for sizes in (*SIZES, (700, 128, 100)):
        for dtype in (torch.float32, torch.bfloat16):
            for weights in (torch.float32, torch.bfloat16):
                x, weight, bias, grad = operands(*sizes, dtype=dtype)
                inputs = (x, weight.to(weights), bias)
                for out in (torch.float32, torch.bfloat16):
                    results = with_gradients(linear, inputs, grad, dtype=out)
                    note(f"{dtype} linear {sizes} {weights} {out}", results)
    for dtype in (torch.float32, torch.bfloat16):
        ids = torch.randint(7, (300,), generator=torch.Generator().manual_seed(0))
        weight, grad = normal(9, 37, dtype=dtype), normal(300, 37, dtype=dtype, seed=1)
        note(
            f"embedding {dtype}", with_gradients(lambda w, i=ids: embedding(i, w), (weight,), grad)
        )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
