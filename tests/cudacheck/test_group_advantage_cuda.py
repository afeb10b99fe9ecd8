"""group_advantage's CUDA kernels: what nvcc made of them, run by the interpreter, gives the CPU's
bits; their access patterns; faults planted in them."""

import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from cudacheck import toolkit
from cudacheck.emulator import FAULTS, emulated
from cudacheck.probing import aligned
from cudacheck.ptxsim import PtxError, run
from rlir.ops import group_advantage

sys.path.insert(0, str(Path(__file__).parents[1] / "ops"))
from group_advantage_cases import sample

SOURCE = toolkit.CSRC / "cuda" / "group_advantage.cu"
NAMES = {torch.float64: "double", torch.float32: "float"}
NAMES |= {torch.bfloat16: "BFloat16", torch.float16: "Float16"}
DTYPES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
SCALES = {"group": 0, "batch": 1, "none": 2}


def array(x: Tensor) -> np.ndarray:
    return x.contiguous().view(torch.uint8).numpy()


def arguments(
    r: np.ndarray,
    out: np.ndarray,
    deviation: np.ndarray,
    x: Tensor,
    *,
    mask: np.ndarray | None,
    sorted_ids: tuple[np.ndarray, np.ndarray] | None,
    scale: str,
    clip: float,
) -> bytes:
    """struct GroupAdvantage of csrc/cuda/group_advantage.cuh."""

    def pointer(a: np.ndarray | None) -> int:
        return 0 if a is None else a.ctypes.data

    rows, size = x.numel(), x.shape[-1]
    ids, order = sorted_ids or (None, None)
    stride = 0 if ids is not None else size
    return struct.pack(
        "<5Q6q2i2?6xdd1Q",
        *(pointer(r), pointer(out), pointer(mask), pointer(ids), pointer(order)),
        *(rows, rows if ids is not None else size, stride, 1, stride, 1),
        *(DTYPES[x.dtype], SCALES[scale], False, True),
        *(1e-4, clip, pointer(deviation)),
    )


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize(
    ("shape", "kernel", "scale"),
    [
        ((9, 16), "tile", "group"),
        ((3, 5), "tile", "batch"),
        ((9, 37), "scattered", "none"),
        ((4, 30), "ids", "group"),
    ],
)
def test_ptx_gives_the_bits_of_the_cpu(
    arch: str, dtype: torch.dtype, shape: tuple[int, int], kernel: str, scale: str
) -> None:
    x = sample(*shape, dtype, seed=5, nan=0.1)
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.8
    ids = torch.arange(x.numel()) % 3 if kernel == "ids" else None
    flat = x.flatten() if ids is not None else x
    own_mask = mask.reshape(flat.shape)
    want = group_advantage(flat, ids, scale=scale, mask=own_mask, clip=1.5)

    r, m = aligned(array(x).ravel()), array(mask).ravel()
    out = aligned(np.zeros_like(r))
    deviation = np.full(1, np.nan)
    inputs = [r, m]
    sorted_ids = None
    if ids is not None:
        values, order = torch.sort(ids, stable=True)
        sorted_ids = (values.numpy(), order.numpy())
        inputs += sorted_ids
    given = arguments(r, out, deviation, x, mask=m, sorted_ids=sorted_ids, scale=scale, clip=1.5)
    kernels = toolkit.kernels(SOURCE, arch)
    outputs = [out, deviation]
    if scale == "batch":
        batch = kernels[f"batch_kernel<{NAMES[dtype]}>"]
        run(batch, [1], [16], [given], inputs=inputs, outputs=[deviation])
    name = "tile" if kernel == "tile" else "scattered"
    teams = x.numel() if ids is not None else shape[0]
    machine = run(
        kernels[f"{name}_kernel<{NAMES[dtype]}>"],
        [-(-teams // 8)],
        [128],
        [given],
        inputs=inputs,
        outputs=outputs,
        shared_bytes=-(-8 * shape[1] * x.element_size() // 16) * 16 if name == "tile" else 0,
        order="random" if arch == "sm_90" and shape[0] < 9 else "grid",
    )
    assert bytes(out) == bytes(array(want).ravel())
    if name == "tile":  # the copies are 16 bytes wide
        assert any(op.startswith("cp.async.cg") for op in machine.executed)


def test_negative_ids_fail_an_assertion_on_the_device() -> None:
    x, ids = sample(1, 8, torch.float32), torch.tensor([-1, -1, 0, 0, 0, 1, 1, 1])
    r, out, deviation = array(x).ravel().copy(), np.zeros(32, np.uint8), np.zeros(1)
    pair = (ids.numpy(), np.arange(8))
    options = {"mask": None, "sorted_ids": pair, "scale": "group", "clip": np.inf}
    given = arguments(r, out, deviation, x, **options)
    kernel = toolkit.kernels(SOURCE, "sm_80")["scattered_kernel<float>"]
    with pytest.raises(PtxError, match="the kernel called __assert"):
        run(kernel, [1], [128], [given], inputs=[r, *pair], outputs=[out])
    got = out.view(np.float32)
    assert np.isnan(got[:2]).all()


def test_accesses_are_wide_and_without_conflicts() -> None:
    r = sample(8, 16, torch.float32)
    with emulated("checked") as emulator:
        emulator.configure(profile=0)
        group_advantage(r)
        places = emulator.profile()
    wide = {(p.space, p.kind) for p in places if p.bytes == 16}
    assert {("global", "read"), ("global", "write"), ("shared", "read")} <= wide
    assert all(p.ratio == 1.0 for p in places), places


@pytest.mark.parametrize("fault", [f.split(":")[1] for f in FAULTS if "group_advantage" in f])
def test_planted_faults_are_found(fault: str) -> None:
    what = {
        "TAIL": "out of bounds: read of 16 bytes",
        "WAIT": "before its cp.async was waited for",
        "BARRIER": "race in shared memory",
    }
    r = sample(9, 5, torch.float32)
    with (
        emulated(f"rlir_emu_group_advantage_{fault}", "random"),
        pytest.raises(RuntimeError, match=what[fault]),
    ):
        torch.ops.rlir.group_advantage(r)


@pytest.mark.parametrize("fault", ["WAIT", "BARRIER"])
def test_planted_faults_are_found_in_the_ptx(fault: str) -> None:
    x = sample(9, 16, torch.float32)
    r, deviation = aligned(array(x).ravel()), np.zeros(1)
    out = aligned(np.zeros_like(r))
    options = {"mask": None, "sorted_ids": None, "scale": "group", "clip": np.inf}
    given = arguments(r, out, deviation, x, **options)
    kernel = toolkit.kernels(SOURCE, "sm_80", f"RLIR_FAULT_{fault}")["tile_kernel<float>"]
    with pytest.raises(PtxError, match=r"race: read|before its cp.async"):
        run(kernel, [2], [128], [given], inputs=[r], outputs=[out], shared_bytes=512)
