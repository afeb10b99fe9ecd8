"""What the tests of rotary and rotary_append share: inputs, tables, digests of bits.

Run as a program with a number of threads, this file prints digests of the kernels' bits; the tests
run it under every instruction set.
"""

import hashlib
import json
import sys
from typing import NamedTuple

import torch
from row_cases import normal
from torch import Tensor

from rlir import _build_info
from rlir.ops import rotary, rotary_append_

DTYPES = (torch.float32, torch.bfloat16)
KINDS = {
    "float32": (torch.float32, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float32 to bfloat16": (torch.float32, torch.bfloat16),
}
"""Dtypes of what rotary_append_ takes and of what it writes."""


def table(positions: int, dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin [P, D] that differ in every element: what belongs where shows."""
    angle = torch.arange(positions)[:, None] * 0.37 + torch.arange(dim) * 1.3
    return angle.cos(), angle.sin()


class Step(NamedTuple):
    """What rotary_append_ takes, in its order."""

    q: Tensor
    k: Tensor
    v: Tensor
    cos: Tensor
    sin: Tensor
    cache_k: Tensor
    cache_v: Tensor
    positions: Tensor


def step(
    b: int,
    t: int,
    hq: int,
    hkv: int,
    d: int,
    capacity: int,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    kept: torch.dtype | None = None,
) -> Step:
    """Tokens at random slots of a cache that holds 7, of another dtype if one is ``kept``."""
    generator = torch.Generator().manual_seed(seed)
    slots = [torch.randperm(capacity, generator=generator)[:t] for _ in range(b)]
    q = normal(b, t, hq, d, dtype=dtype, seed=seed)
    k, v = (normal(b, t, hkv, d, dtype=dtype, seed=seed + i) for i in (1, 2))
    caches = [torch.full((b, capacity, hkv, d), 7.0, dtype=kept or dtype) for _ in range(2)]
    positions = torch.stack(slots) if b else torch.zeros(0, t, dtype=torch.int64)
    return Step(q, k, v, *table(capacity + 3, d), *caches, positions)


def main() -> None:
    torch.set_num_threads(int(sys.argv[1]))
    found = {"isa": _build_info.used_cpu_isa()}
    for kind, (dtype, kept) in KINDS.items():
        for d in (2, 6, 30, 64):
            for interleaved in (False, True):
                case = step(3, 200, 4, 2, d, 300, dtype, kept=kept)
                x = case.q.requires_grad_()
                out = rotary(x, case.cos[:200], case.sin[:200], interleaved=interleaved)
                out.backward(normal(*x.shape, dtype=dtype, seed=5))
                turned = rotary_append_(*case, interleaved=interleaved)
                digest = hashlib.sha256()
                for y in (out.detach(), x.grad, turned, case.cache_k, case.cache_v):
                    digest.update(y.contiguous().view(torch.uint8).numpy().tobytes())
                found[f"{kind} {d} {interleaved}"] = digest.hexdigest()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
