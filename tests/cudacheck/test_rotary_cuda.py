"""The CUDA kernels of rotary and rotary_append: what nvcc made of them gives the CPU's bits."""

import re
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from cudacheck import toolkit
from cudacheck.emulator import emulated
from cudacheck.probing import aligned
from cudacheck.ptxsim import run
from rlir.ops import rotary, rotary_append_

sys.path.insert(0, str(Path(__file__).parents[1] / "ops"))
from rotary_cases import KINDS

FOLDER = toolkit.CSRC / "cuda"
DTYPES = {torch.float32: 1, torch.bfloat16: 2}
archs = pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
layouts = pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def array(x: Tensor) -> np.ndarray:
    return aligned(x.detach().contiguous().view(torch.uint8).numpy().ravel())


def strides(x: Tensor) -> tuple[int, ...]:
    return x.stride()[:3]


@archs
@dtypes
@layouts
@pytest.mark.parametrize("dim", [32, 30])
def test_rotary_gives_the_bits_of_the_cpu(
    arch: str, dtype: torch.dtype, interleaved: bool, dim: int
) -> None:
    b, t, h = 2, 3, 5
    x, cos, sin = normal(b, t, h, dim, dtype=dtype), normal(t, dim, seed=1), normal(t, dim, seed=2)
    wide = int(dim % 8 == 0)
    kernel = toolkit.kernels(FOLDER / "rotary.cu", arch)[f"rotary_kernel<{wide}>"]
    for transposed in (False, True):
        want = torch.ops.rlir.rotary.default(x, cos, sin, interleaved, transposed)
        inputs, out = [array(y) for y in (x, cos, sin)], aligned(np.zeros_like(array(want)))
        places = [y.ctypes.data for y in inputs]
        args = struct.pack("<Qi4x3q", places[0], DTYPES[dtype], *strides(x))
        args += struct.pack("<2QqQ", *places[1:], 0, out.ctypes.data)
        args += struct.pack("<3q??6x", t, h, dim, interleaved, transposed)
        blocks = -(-b * t * h * -(-dim // 8) // 256)
        count = struct.pack("<q", b * t)
        machine = run(kernel, [blocks], [256], [args, count], inputs=inputs, outputs=[out])
        assert bytes(out) == bytes(array(want))
        if wide:  # four elements at a time
            for access in ("ld", "st"):
                pattern = rf"{access}\.global\.(cg\.)?v[24]\."
                assert any(re.match(pattern, op) for op in machine.executed)
    assert rotary(x, cos, sin, interleaved=interleaved).equal(
        torch.ops.rlir.rotary.default(x, cos, sin, interleaved, False)
    )


@archs
@pytest.mark.parametrize("kind", KINDS)
@layouts
@pytest.mark.parametrize("dim", [32, 30])
def test_rotary_append_gives_the_bits_of_the_cpu(
    arch: str, kind: str, interleaved: bool, dim: int
) -> None:
    dtype, kept = KINDS[kind]
    b, t, h, kv, capacity = 2, 3, 4, 2, 9
    q = normal(b, t, h, dim, dtype=dtype)
    k, v = (normal(b, t, kv, dim, dtype=dtype, seed=i) for i in (1, 2))
    cos, sin = (normal(capacity + 2, dim, seed=i) for i in (3, 4))
    positions = torch.tensor([[4, 0, 8], [2, 7, 3]])
    caches = [torch.full((b, capacity, kv, dim), 7.0, dtype=kept) for _ in range(2)]
    inputs = [array(y) for y in (q, k, v, cos, sin, positions)]
    outputs = [array(torch.zeros(q.shape, dtype=kept)), *(array(y) for y in caches)]
    at = [y.ctypes.data for y in inputs]
    to = [y.ctypes.data for y in outputs]
    args = struct.pack("<3Q9q", *at[:3], *strides(q), *strides(k), *strides(v))
    args += struct.pack("<2i2QQ", DTYPES[dtype], DTYPES[kept], *at[3:])
    args += struct.pack("<3Q6q", *to, *strides(caches[0]), *strides(caches[1]))
    args += struct.pack("<4q?7x", t, h, kv, dim, interleaved)
    limit = struct.pack("<q", capacity)
    wide = int(dim % 8 == 0)
    kernel = toolkit.kernels(FOLDER / "rotary_append.cu", arch)[f"append_kernel<{wide}>"]
    run(kernel, [b * t], [128], [args, limit], inputs=inputs, outputs=outputs)
    want = rotary_append_(q, k, v, cos, sin, *caches, positions, interleaved=interleaved)
    for got, right in zip(outputs, (want, *caches), strict=True):
        assert bytes(got) == bytes(array(right))


@pytest.mark.parametrize("position", [-1, 9, 11])
def test_the_cuda_kernel_asserts_what_it_cannot_say(position: int) -> None:
    q, k = normal(1, 2, 2, 8), normal(1, 2, 1, 8)
    cos = normal(12, 8)
    caches = [torch.zeros(1, 9, 1, 8) for _ in range(2)]
    positions = torch.tensor([[3, position]])
    with (
        emulated("checked"),
        pytest.raises(RuntimeError, match="device assertion: rotary_append_: positions must be"),
    ):
        torch.ops.rlir.rotary_append_.default(q, k, k, cos, cos, *caches, positions, False)
