"""video_attention's CUDA kernels: what nvcc made of them, run by the interpreter, forward and
backward; bits, access patterns, faults planted in them."""

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cudacheck import toolkit
from cudacheck.attention_calls import (
    SIMT_THREADS,
    THREADS,
    Attention,
    Backward,
    Forward,
    GradientRows,
    Memory,
    key_gradient_bytes,
    query_gradient_bytes,
    simt_bytes,
    simt_gradient_bytes,
    tall,
    tensor,
    tile_bytes,
)
from cudacheck.emulator import FAULTS, emulated
from cudacheck.ptxsim import PtxError, run
from rlir.errors import InputError
from rlir.ops import Mask, causal, diagonal, frame_causal, video_attention

sys.path.insert(0, str(Path(__file__).parents[1] / "ops"))
from attention_cases import BF16, FLOAT, Inputs, inputs, outputs, seen_by

FORWARD = toolkit.CSRC / "cuda" / "video_attention.cu"
BACKWARD = toolkit.CSRC / "cuda" / "video_attention_backward.cu"
ARCHS = ("sm_80", "sm_90")


def positions(x: Inputs) -> Tensor | None:
    return x.options.get("q_positions")


def call_of(memory: Memory, x: Inputs) -> Attention:
    keys = memory.keys(x.k, x.v, x.options.get("k_lengths"))
    return memory.attention(
        *(x.q, [keys], x.options["mask"], x.k.shape[2]),
        positions=positions(x),
        q_lengths=x.options.get("q_lengths"),
        scale=x.options.get("scale"),
    )


def forward(x: Inputs, kernels: dict) -> tuple[Tensor, Tensor, Any]:
    """out, lse and the machine."""
    memory = Memory()
    b, tq, hq, d = x.q.shape
    hkv = x.k.shape[2]
    out, lse = memory.take(x.q.numel() * x.q.itemsize), memory.take(b * tq * hq * 4)
    f = Forward(call_of(memory, x), out.ctypes.data, lse.ctypes.data)
    rows = tq * hq // hkv
    if x.q.dtype == BF16:
        m = tall(d, rows, x.options["mask"])
        tiles, threads = -(-rows // (64 * m)), THREADS
        name, shared = f"attend_kernel<{d}, {m}, 1>", tile_bytes(d, m, keeps=True)
    else:
        tiles, threads = -(-rows // 32), SIMT_THREADS
        name, shared = f"simt_kernel<{d}>", simt_bytes(d)
    grid = [tiles * b * hkv]
    machine = run(kernels[name], grid, [threads], [bytes(f), tiles], **memory.options(shared))
    return tensor(out, x.q.dtype, *x.q.shape), tensor(lse, FLOAT, b, tq, hq), machine


def backward(x: Inputs, out: Tensor, lse: Tensor, kernels: dict) -> list[Tensor]:
    """dq, dk and dv."""
    memory = Memory()
    b, tq, hq, d = x.q.shape
    tk, hkv = x.k.shape[1:3]
    rows = tq * hq // hkv
    tiles, cores = -(-rows // 64), x.q.dtype == BF16
    scratch = [memory.take(b * tiles * n) for n in (hkv * 256, hkv * 256, 64 * 16, 16)]
    dq, dk, dv = (memory.take(t.numel() * t.itemsize) for t in (x.q, x.k, x.v))
    g = Backward(
        call=call_of(memory, x),
        grad_out=memory.heads(x.d_out),
        out=memory.heads(out),
        lse=memory.give(lse),
        grad_lse=memory.give(x.d_lse),
        grad_lse_strides=x.d_lse.contiguous().stride(),
        dq=dq.ctypes.data,
    )
    g.rows[0] = GradientRows(*(s.ctypes.data for s in scratch))
    g.dk[0], g.dv[0] = dk.ctypes.data, dv.ctypes.data
    kind = "BFloat16" if cores else "float"
    options = memory.options(0)
    words = [bytes(g), 0, tiles]
    run(kernels[f"rows_kernel<{kind}>"], [tiles * hkv * b], [THREADS], words, **options)
    threads = THREADS if cores else SIMT_THREADS
    step, prefix = (64, "") if cores else (32, "simt_")
    parts = f"{d}, 1" if cores else f"{d}"
    row_tiles, blocks = -(-rows // step), -(-tk // step)
    options = memory.options(query_gradient_bytes(d) if cores else simt_gradient_bytes(d))
    name = f"{prefix}queries_kernel<{parts}>"
    run(kernels[name], [row_tiles * hkv * b], [threads], [bytes(g), row_tiles], **options)
    options = memory.options(key_gradient_bytes(d) if cores else simt_gradient_bytes(d))
    words = [bytes(g), bytes(g), 1, 0, blocks]
    run(kernels[f"{prefix}keys_kernel<{d}>"], [blocks * hkv * b], [threads], words, **options)
    return [
        tensor(raw, t.dtype, *t.shape) for raw, t in zip((dq, dk, dv), (x.q, x.k, x.v), strict=True)
    ]


CASES = {
    "causal, 32": ((1, 70, 70), (2, 1), 32, {"mask": causal(30)}),
    "frames, 64": (
        (2, 9, 75),
        (3, 1),
        64,
        {"mask": frame_causal(20, 3), "k_lengths": torch.tensor([75, 33])},
    ),
    "diagonal, 128": (
        (1, 6, 80),
        (2, 2),
        128,
        {"mask": diagonal(3, 6, 2, 4), "q_positions": torch.tensor([[50, 7, 79, 60, 22, 3]])},
    ),
    "refresh, 64": (
        (1, 40, 150),
        (2, 1),
        64,
        {
            "mask": diagonal(3, 6, 2, 4, None, 1, True),
            "q_positions": torch.arange(70, 150, 2)[None],
        },
    ),
    "lengths, 64": (
        (1, 40, 66),
        (4, 2),
        64,
        {"mask": causal(), "q_lengths": torch.tensor([31]), "scale": 0.3},
    ),
}


def case(name: str, dtype: torch.dtype) -> Inputs:
    sizes, heads, d, options = CASES[name]
    return inputs(*sizes, heads, d, dtype, **options)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("arch", ARCHS)
def test_ptx_on_tensor_cores(name: str, arch: str) -> None:
    x = case(name, BF16)
    out, lse, machine = forward(x, toolkit.kernels(FORWARD, arch))
    got = [
        out,
        lse.where(lse > -math.inf, 0),
        *backward(x, out, lse, toolkit.kernels(BACKWARD, arch)),
    ]
    with emulated("plain"):
        want = outputs(video_attention, x)
    for a, b, loose in zip(got, want, (1, 0, 1, 1, 1), strict=True):
        # Sums inside of a product, and so roundings to bfloat16, may differ in the last bit.
        atol = (1e-2 if loose else 1e-5) * float(b.abs().max())
        torch.testing.assert_close(a.float(), b.float(), rtol=0, atol=atol)
    assert torch.isneginf(lse).equal(~seen_by(x).any(-1)[..., None].expand_as(lse))
    for opcode in ("mma.sync", "ldmatrix", "cp.async.cg", "ex2.approx", "st.global.v4"):
        assert any(op.startswith(opcode) for op in machine.executed), opcode


@pytest.mark.parametrize(("name", "arch"), list(zip(CASES, ARCHS * 3, strict=False)))
def test_ptx_gives_the_bits_of_the_cpu_in_float32(name: str, arch: str) -> None:
    x = case(name, FLOAT)
    out, lse, _ = forward(x, toolkit.kernels(FORWARD, arch))
    want_out, want_lse, *grads = outputs(video_attention, x)
    assert out.equal(want_out)
    assert lse.where(lse > -math.inf, 0).equal(want_lse)
    got = [out, *backward(x, out, lse, toolkit.kernels(BACKWARD, arch))]
    for a, b in zip(got, [want_out, *grads], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * max(1.0, float(b.abs().max())))


@pytest.mark.parametrize(
    "mask",
    [
        *(causal(), causal(70), frame_causal(24, 5)),
        *(diagonal(4, 6, 2, 5), diagonal(4, 6, 2, 5, refresh=True)),
    ],
)
@pytest.mark.parametrize("d", [32, 64, 128])
def test_float32_has_the_bits_of_the_cpu(mask: Mask, d: int) -> None:
    x = inputs(2, 40, 300, (4, 2), d, FLOAT, mask=mask, k_lengths=torch.tensor([300, 131]))
    want = video_attention(x.q, x.k, x.v, **x.options, return_lse=True)
    with emulated("plain"):
        got = video_attention(x.q, x.k, x.v, **x.options, return_lse=True)
    assert got[0].equal(want[0])
    assert got[1].equal(want[1])


@pytest.mark.parametrize("d", [32, 64, 128])
def test_chunks_join(d: int) -> None:
    """More than 512 keys; queries of a tile that see one chunk, the other, or both."""
    places = torch.tensor([[3, 511, 512, 700, 1100, 1299, 40, 600]])
    for mask in (causal(), causal(200)):
        x = inputs(1, 8, 1300, (8, 1), d, BF16, mask=mask, q_positions=places)
        want = video_attention(x.q.float(), x.k.float(), x.v.float(), **x.options)
        with emulated("checked", "random"):
            got = video_attention(x.q, x.k, x.v, **x.options)
            one = video_attention(x.q[:, 4:5], x.k, x.v, mask=mask, q_positions=places[:, 4:5])
        assert one.equal(got[:, 4:5])
        torch.testing.assert_close(got.float(), want, rtol=0, atol=1.2e-2)


@pytest.mark.parametrize("d", [32, 64, 128])
def test_accesses_are_without_conflicts(d: int) -> None:
    """Tiles through ldmatrix, copies of 16 bytes, rows of results; forward and backward.

    What each row sees (16 bytes) and the sums of former chunks are read as whole structures on a
    GPU; the host compiler may take them apart, so that words of it look like conflicts (4).
    """
    x = inputs(1, 128, 600, (1, 1), d, BF16, mask=causal())
    with emulated("checked") as emulator:
        emulator.configure(profile=0)
        leaves = [t.clone().requires_grad_() for t in (x.q, x.k, x.v)]
        out = video_attention(*leaves, mask=causal())
        places = emulator.profile()
        out.backward(x.d_out)
        places += emulator.profile()
    shared = [p for p in places if p.space == "shared"]
    wide = [p for p in shared if p.bytes == 16 or "warp_ops" in p.where]
    assert wide
    assert all(p.ratio == 1.0 for p in wide), [p for p in wide if p.ratio > 1]
    assert all(p.ratio <= 4.0 for p in shared), shared


def test_lengths_and_positions_that_cannot_be() -> None:
    for name, value in (("q_lengths", [3, 41]), ("k_lengths", [66, -1]), ("k_lengths", [67, 0])):
        x = inputs(2, 40, 66, dtype=BF16, mask=causal(), **{name: torch.tensor(value)})
        with emulated("checked"), pytest.raises(InputError, match="attention: lengths must be"):
            video_attention(x.q, x.k, x.v, **x.options)
    for dtype, position in ((BF16, -1), (FLOAT, 2**31)):
        x = inputs(2, 1, 9, dtype=dtype, mask=causal(), q_positions=torch.tensor([position]))
        with emulated("checked"), pytest.raises(InputError, match="q_positions must be from 0"):
            video_attention(x.q, x.k, x.v, **x.options)


MESSAGES = {
    "video_attention:COPY_WAIT": "before its cp.async was waited for|cp.async",
    "video_attention:COPY_BARRIER": "race in shared memory|never written|cp.async",
    "video_attention:WARP": "race in shared memory",
    "video_attention:MASK": "",
    "video_attention_backward:ROWS_BARRIER": "race in shared memory|never written",
    "video_attention_backward:QUERIES_BARRIER": "race in shared memory|never written|cp.async",
    "video_attention_backward:KEYS_BARRIER": "race in shared memory|never written|cp.async",
    "video_attention_backward:MASK": "",
}
"""Fault -> what is said of it; nothing where results are wrong."""


def test_every_fault_has_its_message() -> None:
    assert {f for f in FAULTS if f.startswith("video_attention")} == set(MESSAGES)


@pytest.mark.parametrize("fault", MESSAGES)
def test_planted_faults_are_found(fault: str) -> None:
    x = inputs(1, 80, 200, (2, 1), 64, BF16, mask=causal())
    want = outputs(video_attention, x)
    with emulated(f"rlir_emu_{fault.replace(':', '_')}", "random"):
        if MESSAGES[fault]:
            with pytest.raises((RuntimeError, InputError), match=MESSAGES[fault]):
                outputs(video_attention, x)
            return
        got = outputs(video_attention, x)
    off = [float((a.float() - b.float()).abs().max()) for a, b in zip(got, want, strict=True)]
    assert max(off) > 0.1, "a key too many"


@pytest.mark.parametrize("fault", ["COPY_WAIT", "COPY_BARRIER"])
def test_planted_faults_are_found_in_the_ptx(fault: str) -> None:
    kernels = toolkit.kernels(FORWARD, "sm_80", f"RLIR_FAULT_{fault}")
    with pytest.raises(PtxError, match=r"race|never written|cp\.async"):
        forward(inputs(1, 8, 200, (2, 1), 32, BF16, mask=causal()), kernels)
