"""What the tests of selected_logprob share: inputs, the tolerance, digests of bits.

Run as a program with a number of threads, this file prints digests of the kernels' bits over many
inputs; the tests run it under every instruction set.
"""

import hashlib
import json
import sys
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from itertools import product

import torch
from torch import Tensor

from rlir import _build_info
from rlir.ops import head_logits, pack_support, sample_tokens, selected_logprob

FLOAT, BF16 = torch.float32, torch.bfloat16
DTYPES = {
    "float32": (FLOAT, FLOAT),
    "bfloat16": (BF16, BF16),
    "bfloat16-float32": (BF16, FLOAT),
    "float32-bfloat16": (FLOAT, BF16),
}
"""Of hidden and weight."""


@dataclass
class Inputs:
    """hidden [N, H], weight [V, H], targets [N], bias [V], gradients of both outputs [N]."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    bias: Tensor
    d_logprob: Tensor
    d_entropy: Tensor
    options: dict = field(default_factory=dict)


def inputs(
    n: int, h: int, v: int, dtypes: tuple[torch.dtype, torch.dtype] = (FLOAT, FLOAT), seed: int = 0
) -> Inputs:
    g = torch.Generator().manual_seed(seed + 1000 * n + v)
    hidden = torch.randn(n, h, generator=g)
    weight = torch.randn(v, h, generator=g) * (2 / max(h, 1) ** 0.5)
    return Inputs(
        hidden.to(dtypes[0]),
        weight.to(dtypes[1]),
        torch.randint(0, v, (n,), generator=g),
        torch.randn(v, generator=g),
        torch.randn(n, generator=g),
        torch.randn(n, generator=g),
    )


def random_support(x: Inputs, seed: int = 0) -> Tensor:
    """Random supports that hold the target."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(len(x.targets), len(x.weight), generator=g) < 0.4
    return pack_support(mask.scatter(1, x.targets[:, None], True))


def outputs(op, x: Inputs, *, bias: bool = True, double: bool = False, **options) -> list[Tensor]:
    """logprob, entropy and the gradients of hidden, weight and bias. -inf becomes 0."""

    def leaf(t: Tensor) -> Tensor:
        return t.detach().to(torch.float64 if double else t.dtype).requires_grad_()

    hidden, weight, b = leaf(x.hidden), leaf(x.weight), leaf(x.bias)
    with op.active() if hasattr(op, "active") else nullcontext():
        logprob, entropy = op(
            hidden, weight, x.targets, bias=b if bias else None, **{**x.options, **options}
        )
        logprob = logprob.where(logprob.isfinite(), 0)
        ((logprob * x.d_logprob).sum() + (entropy * x.d_entropy).sum()).backward()
    return [logprob.detach(), entropy.detach(), hidden.grad, weight.grad, *([b.grad] * bias)]


def assert_close(got: Tensor, peer: Tensor, truth: Tensor, what: str = "") -> None:
    """At most twice the error of PyTorch in the same dtype, plus one ulp of the largest value."""
    assert_all_close([(got, peer, truth)], what)


def assert_all_close(
    cases: list[tuple[Tensor, Tensor, Tensor]], what: str = "", moved: float = 0.0
) -> None:
    """The same of the largest errors over all cases, plus `moved`.

    On a few values a peer can be lucky: cases with few rows come in numbers, and `moved` is what
    rounding the inputs and the outputs alone may cost.
    """
    error = allowed = ulp = 0.0
    for got, peer, truth in cases:
        assert got.shape == truth.shape
        assert got.dtype == peer.dtype
        if not got.numel():
            continue
        error = max(error, float((got.double() - truth).abs().max()))
        allowed = max(allowed, float((peer.double() - truth).abs().max()))
        ulp = max(ulp, torch.finfo(got.dtype).eps * float(truth.abs().max()))
    assert error <= 2 * allowed + ulp + moved, (
        f"{what}: error {error}, allowed 2 x {allowed} + {ulp} + {moved}"
    )


def jittered(x: Inputs) -> Inputs:
    """Float64 inputs, each an ulp of float32 higher or lower."""
    g = torch.Generator().manual_seed(0)

    def jitter(t: Tensor) -> Tensor:
        sign = torch.randint(0, 2, t.shape, generator=g) * 2 - 1
        return t.double() * (1 + torch.finfo(FLOAT).eps * sign)

    return replace(x, hidden=jitter(x.hidden), weight=jitter(x.weight), bias=jitter(x.bias))


def bytes_of(x: Tensor) -> bytes:
    return x.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()


SHAPES = ((1, 8, 5), (50, 33, 700), (401, 24, 300))
OPTIONS = ({}, {"temperature": 0.7, "vocab_range": (3, 290), "top_p": 0.8}, {"top_k": 4})


def digests() -> dict[str, str]:
    """Digests of the kernels' bits over dtypes, shapes and options."""
    found = {}
    for (name, dtypes), (i, options) in product(DTYPES.items(), enumerate(OPTIONS)):
        digest = hashlib.sha256()
        for shape in SHAPES:
            x = inputs(*shape, dtypes)
            if shape[2] < 290 and "vocab_range" in options:
                continue
            for tensor in outputs(selected_logprob, x, **options):
                digest.update(bytes_of(tensor))
            logits = head_logits(x.hidden, x.weight, bias=x.bias)
            drawn = sample_tokens(logits, seed=1, offset=2, return_support=True, **options)
            for tensor in (logits, *drawn):
                digest.update(bytes_of(tensor))
        found[f"{name} {i}"] = digest.hexdigest()
    return found


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[1]))
    print(json.dumps({**digests(), "isa": _build_info.used_cpu_isa()}))
