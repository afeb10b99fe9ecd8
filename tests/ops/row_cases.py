"""What the tests of rms_norm and swiglu share: layouts, tolerances, digests of bits.

Run as a program with a number of threads, this file prints digests of the kernels' bits; the tests
run it under every instruction set.
"""

import hashlib
import json
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rlir import _build_info
from rlir.ops import rms_norm, swiglu

DTYPES = (torch.float32, torch.bfloat16)
SHAPES = ((3, 5, 37), (130, 256), (99, 1), (0, 8), (2, 0, 3), (7, 1027), (65, 16))


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same values under other strides."""
    if layout == "transposed":
        return x.movedim(0, -1).contiguous().movedim(-1, 0)
    if layout == "step":
        return torch.stack([x, torch.full_like(x, torch.nan)], -1)[..., 0]
    if layout == "padded":
        return torch.cat([x, torch.full_like(x, torch.nan)], -1)[..., : x.shape[-1]]
    return x


LAYOUTS = ("plain", "transposed", "step", "padded")


def with_gradients(
    op: Callable[..., Tensor], inputs: Sequence[Tensor], grad: Tensor, **options: object
) -> list[Tensor]:
    """The op's result and its inputs' gradients."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = op(*leaves, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


def assert_close(got: Tensor, peer: Tensor, truth: Tensor) -> None:
    """At most twice the error of PyTorch in the same dtype, plus one ulp of the largest value."""
    assert got.dtype == peer.dtype
    assert got.shape == truth.shape
    if not got.numel():
        return
    error = (got.double() - truth).abs().max()
    allowed = 2 * (peer.double() - truth).abs().max()
    ulp = torch.finfo(got.dtype).eps * truth.abs().max()
    assert error <= allowed + ulp, f"error {error}, allowed {allowed} + {ulp}"


def main() -> None:
    torch.set_num_threads(int(sys.argv[1]))
    found = {"isa": _build_info.used_cpu_isa()}

    def note(name: str, tensors: Sequence[Tensor]) -> None:
        data = b"".join(x.contiguous().view(torch.uint8).numpy().tobytes() for x in tensors)
        found[name] = hashlib.sha256(data).hexdigest()

    for dtype in DTYPES:
        for shape in ((130, 256), (300, 37)):
            x, w, grad = (normal(*s, dtype=dtype, seed=i) for i, s in enumerate([shape] * 3))
            name = f"{dtype} {shape}"
            note(f"norm {name}", with_gradients(rms_norm, (x, w[0].float()), grad))
            note(f"gate {name}", with_gradients(swiglu, (x * 8, w), grad))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
