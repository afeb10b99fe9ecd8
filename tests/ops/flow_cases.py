"""What the tests of flow_sde_step share: published formulas and inputs.

Run as a program with a number of threads, this file prints digests of the kernel's bits; the tests
run it under every instruction set.
"""

import hashlib
import json
import math
import sys

import torch
from torch import Tensor

from rlir import _build_info
from rlir.ops import flow_sde_step

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SCHEDULES = (("flow_grpo", 0.7), ("dance", 0.3), ("cps", 0.8))


def published(
    schedule: str, v: Tensor, x: Tensor, sigma: float, then: float, a: float, reached: Tensor
) -> tuple[Tensor, Tensor, float]:
    """Mean, log-probability and deviation as the projects write them, in the inputs' dtype."""
    dims = tuple(range(1, x.dim()))
    if schedule == "cps":
        std = then * math.sin(a * math.pi / 2)
        x0, x1 = x - sigma * v, x + v * (1 - sigma)
        mean = x0 * (1 - then) + x1 * math.sqrt(then**2 - std**2)
        return mean, -((reached - mean) ** 2).mean(dims), std
    dt = then - sigma
    if schedule == "flow_grpo":
        s = math.sqrt(sigma / (1 - (then if sigma == 1 else sigma))) * a
        mean = x * (1 + s**2 / (2 * sigma) * dt) + v * (1 + s**2 * (1 - sigma) / (2 * sigma)) * dt
        std = s * math.sqrt(-dt)
    else:
        score = -(x - (x - sigma * v) * (1 - sigma)) / sigma**2
        mean = x + dt * v - 0.5 * a**2 * score * dt
        std = a * math.sqrt(-dt)
    gauss = -((reached - mean) ** 2) / (2 * std**2) - math.log(std) - math.log(2 * math.pi) / 2
    return mean, gauss.mean(dims), std


def latents(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    """A velocity, a sample and a later sample."""
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for _ in range(3)]


def assert_close(got: Tensor, peer: Tensor, truth: Tensor) -> None:
    """At most twice the error of PyTorch in the same dtype, plus one ulp of the largest value."""
    assert got.dtype == peer.dtype
    if got.dtype == torch.float64:  # the truth is no better
        torch.testing.assert_close(got, truth, rtol=1e-13, atol=1e-13 * float(truth.abs().max()))
        return
    error = (got.double() - truth).abs().max()
    allowed = 2 * (peer.double() - truth).abs().max()
    ulp = torch.finfo(got.dtype).eps * truth.abs().max()
    assert error <= allowed + ulp, f"error {error}, allowed {allowed} + {ulp}"


def digests() -> dict[str, str]:
    found = {}
    for schedule, a in SCHEDULES:
        for dtype in DTYPES:
            digest = hashlib.sha256()
            for shape in ((3, 1), (5, 63), (2, 3, 5, 7), (2, 9001), (1, 40000)):
                v, x, later = latents(*shape, dtype=dtype)
                v.requires_grad_()
                options = {"schedule": schedule, "noise_level": a, "seed": 7, "offset": 2}
                drawn = flow_sde_step(v, x, 0.9, 0.8, **options)
                scored = flow_sde_step(v, x, 0.9, 0.8, previous=later, **options)
                (scored.logprob.sum() + scored.mean.sum()).backward()
                for out in (*drawn, *scored, v.grad):
                    flat = out.detach().contiguous().flatten()
                    digest.update(flat.view(torch.uint8).numpy().tobytes())
            found[f"{schedule} {dtype}"] = digest.hexdigest()
    return found


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[1]))
    print(json.dumps({**digests(), "isa": _build_info.used_cpu_isa()}))
