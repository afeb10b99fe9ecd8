"""group_attention on CUDA: video_attention's kernels on keys in two parts, and gradients over the
queries of two calls; what nvcc made of them, run by the interpreter."""

import math
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cudacheck import toolkit
from cudacheck.attention_calls import (
    THREADS,
    Attention,
    Backward,
    Forward,
    GradientRows,
    Memory,
    key_gradient_bytes,
    query_gradient_bytes,
    tall,
    tensor,
    tile_bytes,
)
from cudacheck.emulator import emulated
from cudacheck.ptxsim import run
from rlir.ops import Mask, causal, diagonal, group_attention, video_attention

sys.path.insert(0, str(Path(__file__).parents[1] / "ops"))
from attention_cases import BF16, Group, group
from row_cases import normal

FORWARD = toolkit.CSRC / "cuda" / "video_attention.cu"
BACKWARD = toolkit.CSRC / "cuda" / "video_attention_backward.cu"
DTYPE = BF16


def calls(memory: Memory, g: Group, mask: Mask) -> list[Attention]:
    """Of the prefix and of the suffixes."""
    prefix, suffix = memory.keys(g.k_prefix, g.v_prefix), memory.keys(g.k_suffix, g.v_suffix)
    heads = g.k_prefix.shape[2]
    return [
        memory.attention(g.q_prefix, [prefix], mask, heads),
        memory.attention(g.q_suffix, [prefix, suffix], mask, heads, g.size),
    ]


def forward(g: Group, mask: Mask, kernels: dict) -> list[tuple[Tensor, Tensor]]:
    """out and lse of both."""
    memory, results = Memory(), []
    for call, q in zip(calls(memory, g, mask), (g.q_prefix, g.q_suffix), strict=True):
        n, t, hq, d = q.shape
        out, lse = memory.take(2 * q.numel()), memory.take(4 * n * t * hq)
        f = Forward(call, out.ctypes.data, lse.ctypes.data)
        rows = t * hq // call.kv_heads
        m = tall(d, rows, mask)
        tiles = -(-rows // (64 * m))
        kernel = kernels[f"attend_kernel<{d}, {m}, {call.parts}>"]
        options = memory.options(tile_bytes(d, m, keeps=True))
        run(kernel, [tiles * n * call.kv_heads], [THREADS], [bytes(f), tiles], **options)
        results.append((tensor(out, DTYPE, *q.shape), tensor(lse, torch.float32, n, t, hq)))
    return results


def backward(
    g: Group, grads: list[Tensor], results: list[tuple[Tensor, Tensor]], mask: Mask, kernels: dict
) -> list[Tensor]:
    """Of q, k and v of the prefix, and of the suffixes."""
    memory, structs = Memory(), []
    shapes = [t.shape for t in g.tensors]
    made = [memory.take(2 * t.numel()) for t in g.tensors]
    d, heads = g.q_prefix.shape[3], g.k_prefix.shape[2]
    for i, call in enumerate(calls(memory, g, mask)):
        out, lse = results[i]
        b = Backward(
            call=call,
            grad_out=memory.heads(grads[i]),
            out=memory.heads(out),
            lse=memory.give(lse),
            dq=made[3 * i].ctypes.data,
        )
        for part in range(call.parts):
            batches = call.sequences if part or call.group == 1 else call.sequences // g.size
            members = call.sequences // batches
            tiles = -(-members * call.tokens * call.heads // heads // 64)
            scratch = [
                memory.take(batches * tiles * s) for s in (heads * 256, heads * 256, 1024, 16)
            ]
            b.rows[part] = GradientRows(*(s.ctypes.data for s in scratch))
            b.dk[part], b.dv[part] = made[3 * part + 1].ctypes.data, made[3 * part + 2].ctypes.data
        for part in range(call.parts):
            batches = call.sequences if part or call.group == 1 else call.sequences // g.size
            tiles = -(-call.sequences // batches * call.tokens * call.heads // heads // 64)
            words = [bytes(b), part, tiles]
            grid = [tiles * heads * batches]
            run(kernels["rows_kernel<BFloat16>"], grid, [THREADS], words, **memory.options(0))
        structs.append(b)
        tiles = -(-call.tokens * call.heads // heads // 64)
        options = memory.options(query_gradient_bytes(d))
        kernel = kernels[f"queries_kernel<{d}, {call.parts}>"]
        run(kernel, [tiles * heads * call.sequences], [THREADS], [bytes(b), tiles], **options)
    for part, (first, second, count) in enumerate(((1, 0, 2), (1, 1, 1))):
        n, slots = shapes[3 * part + 1][:2]
        blocks = -(-slots // 64)
        words = [bytes(structs[first]), bytes(structs[second]), count, part, blocks]
        options = memory.options(key_gradient_bytes(d))
        run(kernels[f"keys_kernel<{d}>"], [blocks * heads * n], [THREADS], words, **options)
    return [tensor(raw, DTYPE, *shape) for raw, shape in zip(made, shapes, strict=True)]


@pytest.mark.parametrize(
    ("arch", "sizes", "heads", "d", "mask"),
    [
        ("sm_80", (1, 2, 40, 30), (2, 1), 64, causal()),
        ("sm_90", (2, 2, 13, 20), (2, 2), 32, diagonal(3, 4, 2, 1)),
        ("sm_80", (1, 2, 20, 9), (3, 1), 128, causal(12)),
        ("sm_80", (1, 2, 20, 15), (2, 1), 32, diagonal(3, 4, 2, 1, None, 0, True)),
    ],
)
def test_ptx(arch: str, sizes: tuple, heads: tuple, d: int, mask: Mask) -> None:
    g = group(*sizes, heads, d, DTYPE)
    grads = [normal(*t.shape, dtype=DTYPE, seed=9) for t in (g.q_prefix, g.q_suffix)]
    results = forward(g, mask, toolkit.kernels(FORWARD, arch))
    got = [out for out, _ in results]
    got += backward(g, grads, results, mask, toolkit.kernels(BACKWARD, arch))
    leaves = [t.clone().requires_grad_() for t in g.tensors]
    with emulated("plain"):
        out = group_attention(*leaves, group_size=g.size, mask=mask)
        want = [*(o.detach() for o in out), *torch.autograd.grad(out, leaves, grads)]
    for a, b in zip(got, want, strict=True):
        # Sums inside of a product, and so roundings to bfloat16, may differ in the last bit.
        torch.testing.assert_close(a.float(), b.float(), rtol=0, atol=1e-2 * float(b.abs().max()))


def test_more_than_a_chunk_has_the_bits_of_whole_sequences() -> None:
    g = group(1, 2, 500, 40, (2, 1), 32, DTYPE)
    with emulated("checked", "random"):
        out_prefix, out_suffix = group_attention(*g.tensors, group_size=2, mask=causal())
    with emulated("plain"):
        whole = video_attention(*g.whole(), mask=causal())
    assert out_suffix.equal(whole[:, 500:])
    assert out_prefix.equal(whole[::2, :500])
    assert math.isfinite(float(out_suffix.sum()))
