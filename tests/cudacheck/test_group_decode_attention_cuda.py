"""group_decode_attention's CUDA kernels: what nvcc made of them, run by the interpreter; bits,
access patterns, a fault planted in them."""

import ctypes as c
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cudacheck import toolkit
from cudacheck.attention_calls import THREADS, Attention, Memory, tensor, tile_bytes
from cudacheck.emulator import FAULTS, emulated
from cudacheck.ptxsim import run
from rlir.errors import InputError
from rlir.ops import causal, diagonal, frame_causal, group_decode_attention, video_attention

sys.path.insert(0, str(Path(__file__).parents[1] / "ops"))
from attention_cases import BF16
from test_group_decode_attention import Step, step

SOURCE = toolkit.CSRC / "cuda" / "group_decode_attention.cu"
CHUNK = 512


class GroupDecode(c.Structure):
    _fields_ = [
        ("call", Attention),
        *((name, c.c_void_p) for name in ("out", "sums", "scales")),
    ]


class Work(c.Structure):
    _fields_ = [("members", c.c_int64), ("tiles", c.c_int32), ("chunks", c.c_int32)]


class WorkPlan(c.Structure):
    _fields_ = [("group", Work), ("rollout", Work)]


def decode(x: Step, kernels: dict) -> tuple[Tensor, object]:
    """out, and the machine that ran the chunks."""
    memory = Memory()
    n, tq, hq, d = x.q.shape
    p, s, hkv = x.prefix_k.shape[1], x.suffix_k.shape[1], x.prefix_k.shape[2]
    parts = [
        memory.keys(x.prefix_k, x.prefix_v, x.prefix_lengths),
        memory.keys(x.suffix_k, x.suffix_v, x.suffix_lengths),
    ]
    call = memory.attention(x.q, parts, x.mask, hkv, x.size, positions=x.q_positions)
    queries, chunks = n * tq * hq, -(-(p + s) // CHUNK)
    out, sums, scales = (
        memory.take(size)
        for size in (2 * queries * d, 4 * chunks * queries * d, 8 * chunks * queries)
    )
    g = GroupDecode(call, out.ctypes.data, sums.ctypes.data, scales.ctypes.data)
    rows = tq * hq // hkv
    plan = WorkPlan(
        Work(x.size, -(-x.size * rows // 64), p // CHUNK),
        Work(1, -(-rows // 64), min(-(-s // CHUNK) + 1, chunks)),
    )
    blocks = sum(w.tiles * w.chunks * hkv * n // w.members for w in (plan.group, plan.rollout))
    options = memory.options(tile_bytes(d, 1, keeps=False))
    words = [bytes(g), bytes(plan)]
    machine = run(kernels[f"chunk_kernel<{d}>"], [blocks], [THREADS], words, **options)
    grid = [-(-queries * d // 4 // THREADS)]
    run(kernels["merge_kernel"], grid, [THREADS], [bytes(g)], **memory.options(0))
    return tensor(out, BF16, *x.q.shape), machine


CASES = {
    "two chunks": (step(1, 2, 1, 560, 20, (2, 1), 32, BF16), "sm_80"),
    "windows": (step(2, 2, 3, 40, 70, (3, 1), 64, BF16, ragged=True, mask=causal(33)), "sm_90"),
    "frames": (step(1, 3, 2, 60, 24, (2, 2), 128, BF16, mask=frame_causal(20, 4)), "sm_80"),
    "diagonal": (step(1, 2, 3, 30, 60, (4, 2), 64, BF16, mask=diagonal(3, 6, 2, 4)), "sm_90"),
    "refresh": (
        step(1, 2, 3, 30, 60, (4, 2), 64, BF16, mask=diagonal(3, 6, 2, 4, refresh=True)),
        "sm_80",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_ptx(name: str) -> None:
    x, arch = CASES[name]
    out, machine = decode(x, toolkit.kernels(SOURCE, arch))
    with emulated("plain"):
        want = x.run(group_decode_attention)
    # Sums inside of a product, and so roundings to bfloat16, may differ in the last bit.
    torch.testing.assert_close(out.float(), want.float(), rtol=0, atol=1e-2)
    for opcode in ("mma.sync", "ldmatrix", "cp.async.cg"):
        assert any(op.startswith(opcode) for op in machine.executed), opcode


@pytest.mark.parametrize("prefix", [500, 512, 1100])
def test_long_streams_have_the_bits_of_the_training_forward(prefix: int) -> None:
    """Chunks of the prefix, of the suffix, and the one that has both."""
    x = step(1, 3, 2, prefix, 600, (4, 2), 32, BF16)
    x.suffix_lengths = torch.tensor([600, 0, 37])
    with emulated("checked", "random"):
        out = x.run(group_decode_attention)
    for n in range(3):
        k, v, _ = x.of_rollout(n)
        with emulated("plain"):
            want = video_attention(x.q[n : n + 1], k, v, mask=causal())
        assert out[n : n + 1].equal(want), f"rollout {n}"


def test_accesses_are_without_conflicts() -> None:
    x = step(1, 4, 4, 560, 60, (4, 1), 64, BF16)
    with emulated("checked") as emulator:
        emulator.configure(profile=0)
        x.run(group_decode_attention)
        places = emulator.profile()
    wide = [p for p in places if p.space == "shared" and (p.bytes == 16 or "warp_ops" in p.where)]
    assert all(p.ratio == 1.0 for p in wide), [p for p in wide if p.ratio > 1]


def test_lengths_that_cannot_be() -> None:
    x = step(2, 2, 1, 30, 9, dtype=BF16)
    x.suffix_lengths = torch.tensor([9, 10, 9, 9])
    with emulated("checked"), pytest.raises(InputError, match="attention: lengths must be"):
        x.run(group_decode_attention)


def test_the_planted_fault_is_found() -> None:
    """Two blocks that leave the sums of one chunk."""
    assert [f for f in FAULTS if f.startswith("group_decode")] == ["group_decode_attention:CHUNK"]
    x = step(1, 2, 1, 600, 9, dtype=BF16)
    with (
        emulated("rlir_emu_group_decode_attention_CHUNK", "random"),
        pytest.raises((RuntimeError, InputError), match=r"race|another block"),
    ):
        x.run(group_decode_attention)
