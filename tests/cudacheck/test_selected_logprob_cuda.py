"""selected_logprob's CUDA kernels: what nvcc made of them, run by the interpreter, forward and
backward; their access patterns; faults planted in them."""

import ctypes as c
import math
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
from rlir.errors import InputError
from rlir.ops import head_logits, selected_logprob

sys.path.insert(0, str(Path(__file__).parents[1] / "ops"))
from selected_logprob_cases import BF16, FLOAT, Inputs, inputs, outputs, random_support

FORWARD = toolkit.CSRC / "cuda" / "selected_logprob.cu"
BACKWARD = toolkit.CSRC / "cuda" / "selected_logprob_backward.cu"
DTYPES = {FLOAT: 1, BF16: 2}
SHARED = {0: 88576, 1: 98304}
"""Bytes, without and with tensor cores."""
ROWS = {0: 64, 1: 128}


class Matrix(c.Structure):
    _fields_ = [
        ("data", c.c_void_p),
        ("dtype", c.c_int32),
        ("major_stride", c.c_int64),
        ("minor_stride", c.c_int64),
    ]


class Head(c.Structure):
    """struct Head of csrc/cuda/selected_logprob.cuh."""

    _fields_ = [
        ("hidden", Matrix),
        ("weight", Matrix),
        ("tensor_cores", c.c_bool),
        ("bias", c.c_void_p),
        ("bias_dtype", c.c_int32),
        *((name, c.c_int64) for name in ("bias_stride", "rows", "depth", "tokens", "low", "high")),
        ("temperature", c.c_float),
        ("support", c.c_void_p),
        ("support_stride", c.c_int64),
        ("targets", c.c_void_p),
        ("target_stride", c.c_int64),
    ]


class Forward(c.Structure):
    """struct SelectedLogprob."""

    _fields_ = [
        ("head", Head),
        *((name, c.c_void_p) for name in ("block_max", "block_sum", "block_dot", "target_z")),
        *((name, c.c_void_p) for name in ("logprob", "entropy", "stats")),
    ]


class Backward(c.Structure):
    """struct HeadGradient."""

    _fields_ = [
        ("head", Head),
        *((name, c.c_void_p) for name in ("stats", "entropy", "grad_logprob", "grad_entropy")),
        *((name, c.c_int64) for name in ("grad_logprob_stride", "grad_entropy_stride")),
        *((name, c.c_int64) for name in ("block_begin", "block_end")),
        *((name, c.c_void_p) for name in ("dz", "hidden_sums", "bias_sums")),
        ("first", c.c_bool),
        ("last", c.c_bool),
        *((name, c.c_void_p) for name in ("grad_hidden", "grad_weight")),
        ("hidden_dtype", c.c_int32),
        ("weight_dtype", c.c_int32),
        ("grad_bias", c.c_void_p),
    ]


def array(x: Tensor) -> np.ndarray:
    return aligned(x.detach().contiguous().view(torch.uint8).numpy().ravel())


class Call:
    """Inputs and outputs of one call on arrays, and the structs that name them. H is a multiple of
    eight, so that operands can go to tensor cores as they are."""

    def __init__(self, x: Inputs, low: int, high: int, temperature: float) -> None:
        self.x, self.low, self.high = x, low, high
        n, h, v = len(x.hidden), x.hidden.shape[1], len(x.weight)
        self.cores = int(x.hidden.dtype == x.weight.dtype == BF16)
        support = random_support(x)
        self.options = {"vocab_range": (low, high), "temperature": temperature, "support": support}
        given = (x.hidden, x.weight, x.bias, support, x.targets, x.d_logprob, x.d_entropy)
        self.inputs = [array(t) for t in given]
        at = [a.ctypes.data for a in self.inputs]
        self.head = Head(
            hidden=Matrix(at[0], DTYPES[x.hidden.dtype], h, 1),
            weight=Matrix(at[1], DTYPES[x.weight.dtype], h, 1),
            tensor_cores=bool(self.cores),
            bias=at[2],
            bias_dtype=1,
            bias_stride=1,
            rows=n,
            depth=h,
            tokens=v,
            low=low,
            high=high,
            temperature=temperature,
            support=at[3],
            support_stride=support.shape[1],
            targets=at[4],
            target_stride=1,
        )
        self.first, self.last = low // 256, (high - 1) // 256 + 1
        self.blocks = self.last - self.first
        self.tiles = -(-n // ROWS[self.cores])
        self.scratch = [np.zeros((self.blocks, n), np.float32) for _ in range(3)]
        self.scratch.append(np.zeros(n, np.float32))
        self.outputs = [np.zeros(n, np.float32), np.zeros(n, np.float32)]
        self.stats = np.zeros((3, n), np.float32)
        self.dz = aligned(np.zeros(n * self.blocks * 256 * (2 if self.cores else 4), np.uint8))
        self.bias_sums = np.zeros((self.tiles, self.blocks * 256), np.float32)
        self.gradients = [aligned(np.zeros_like(a)) for a in self.inputs[:2]]
        self.gradients.append(np.zeros(v, np.float32))

    def forward(self, kernels: dict) -> object:
        a = Forward(self.head, *(s.ctypes.data for s in (*self.scratch, *self.outputs, self.stats)))
        words, n = [bytes(a)], len(self.x.hidden)
        tile = kernels[f"tile_kernel<{self.cores}>"]
        options = {"inputs": self.inputs, "outputs": self.scratch}
        shared = SHARED[self.cores]
        grid = [self.tiles, self.blocks]
        machine = run(tile, grid, [256], words, shared_bytes=shared, **options)
        options = {"inputs": [*self.inputs, *self.scratch], "outputs": [*self.outputs, self.stats]}
        run(kernels["rows_kernel"], [-(-n // 128)], [128], words, **options)
        return machine

    def backward(self, kernels: dict) -> None:
        g = Backward(head=self.head)
        saved = (self.stats, self.outputs[1], *self.inputs[5:])
        names = ("stats", "entropy", "grad_logprob", "grad_entropy")
        made = (self.dz, self.bias_sums, *self.gradients)
        names += ("dz", "bias_sums", "grad_hidden", "grad_weight", "grad_bias")
        for name, x in zip(names, (*saved, *made), strict=True):
            setattr(g, name, x.ctypes.data)
        g.grad_logprob_stride = g.grad_entropy_stride = 1
        g.block_begin, g.block_end, g.first, g.last = self.first, self.last, True, True
        g.hidden_dtype, g.weight_dtype = self.head.hidden.dtype, self.head.weight.dtype
        words, h = [bytes(g)], self.x.hidden.shape[1]
        options = {"inputs": [*self.inputs, *saved], "outputs": [*made]}
        shared, wide = SHARED[self.cores], -(-h // 256)
        weights = -(-self.blocks * 256 // ROWS[self.cores])
        for name, grid in (
            ("gradient", [self.tiles, self.blocks]),
            ("hidden", [self.tiles, wide]),
            ("weight", [weights, wide]),
        ):
            kernel = kernels[f"{name}_kernel<{self.cores}>"]
            run(kernel, grid, [256], words, shared_bytes=shared, **options)
        words.append(self.tiles)
        run(kernels["bias_kernel"], [2 * self.blocks], [128], words, **options)

    def results(self) -> list[Tensor]:
        """logprob, entropy and the gradients of hidden, weight and bias."""
        dtypes = (self.x.hidden.dtype, self.x.weight.dtype)
        got = [torch.from_numpy(a) for a in (*self.outputs, *self.gradients)]
        for i, like in enumerate((self.x.hidden, self.x.weight)):
            got[2 + i] = got[2 + i].view(dtypes[i]).view(like.shape)
        return got


def case(dtype: torch.dtype, n: int = 70, h: int = 40, v: int = 300) -> Call:
    x = inputs(n, h, v, (dtype, dtype))
    low, high = 5, v - 3
    x.targets = x.targets.clamp(low, high - 1)
    return Call(x, low, high, 0.7)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_ptx_gives_the_bits_of_the_cpu_in_float32(arch: str) -> None:
    call = case(FLOAT)
    machine = call.forward(toolkit.kernels(FORWARD, arch))
    call.backward(toolkit.kernels(BACKWARD, arch))
    want = outputs(selected_logprob, call.x, **call.options)
    for got, expected in zip(call.results()[:4], want, strict=False):
        assert got.equal(expected)
    torch.testing.assert_close(call.results()[4], want[4], rtol=1e-5, atol=1e-5)
    assert any(op.startswith("ld.global.v4") for op in machine.executed)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_ptx_on_tensor_cores(arch: str) -> None:
    call = case(BF16)
    machine = call.forward(toolkit.kernels(FORWARD, arch))
    call.backward(toolkit.kernels(BACKWARD, arch))
    want = outputs(selected_logprob, call.x, **call.options)
    for got, expected, loose in zip(call.results(), want, (0, 0, 1, 1, 0), strict=True):
        scale = float(expected.abs().max())
        atol = (2e-2 if loose else 1e-5) * scale  # gradients are made of dz in bfloat16
        torch.testing.assert_close(got.float(), expected.float(), rtol=0, atol=atol)
    for name in ("mma.sync", "ldmatrix", "cp.async.cg"):
        assert any(op.startswith(name) for op in machine.executed)


def test_ptx_of_logits() -> None:
    x = inputs(9, 24, 270, (BF16, BF16))
    call = Call(x, 0, 270, 1.0)
    out = np.zeros((9, 270), np.float32)
    kernel = toolkit.kernels(FORWARD, "sm_80")["logits_kernel<1>"]
    words = [bytes(call.head), out]
    options = {"inputs": call.inputs, "outputs": [out], "shared_bytes": SHARED[1]}
    run(kernel, [1, 2], [256], words, **options)
    want = head_logits(x.hidden, x.weight, bias=x.bias)
    torch.testing.assert_close(torch.from_numpy(out), want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [FLOAT, BF16], ids=["float32", "bf16"])
def test_accesses_are_without_conflicts(dtype: torch.dtype) -> None:
    """Fragments through ldmatrix and rows of the tile; copies of 16 bytes.

    In float32 operands are transposed on their way in (2), and what is one read of 16 bytes a lane
    on a GPU the host compiler makes four of 4 bytes, of every fourth bank (4).
    """
    x = inputs(64, 64, 256, (dtype, dtype))
    with emulated("checked") as emulator:
        emulator.configure(profile=0)
        head_logits(x.hidden, x.weight)
        places = [p for p in emulator.profile() if p.space == "shared"]
    assert places
    limits = {"write": 1.0, "read": 1.0} if dtype == BF16 else {"write": 2.0, "read": 4.0}
    assert all(p.ratio <= limits[p.kind] for p in places), places


MESSAGES = {
    "selected_logprob:COPY_WAIT": "race in shared memory|before its cp.async was waited for",
    "selected_logprob:COPY_BARRIER": "race in shared memory|never written|cp.async",
    "selected_logprob_backward:TILE": "race in shared memory",
}


def test_every_fault_has_its_message() -> None:
    assert {f for f in FAULTS if f.startswith("selected_logprob")} == set(MESSAGES)


@pytest.mark.parametrize("fault", MESSAGES)
def test_planted_faults_are_found(fault: str) -> None:
    x = inputs(20, 136, 90, (BF16, BF16))
    with (
        emulated(f"rlir_emu_{fault.replace(':', '_')}", "random"),
        pytest.raises((RuntimeError, InputError), match=MESSAGES[fault]),
    ):
        outputs(selected_logprob, x)


@pytest.mark.parametrize("fault", ["COPY_WAIT", "COPY_BARRIER"])
def test_planted_faults_are_found_in_the_ptx(fault: str) -> None:
    kernels = toolkit.kernels(FORWARD, "sm_80", f"RLIR_FAULT_{fault}")
    with pytest.raises(PtxError, match=r"race|never written|cp\.async"):
        case(BF16, h=136).forward(kernels)


def test_a_row_without_a_target_in_its_support() -> None:
    call = case(FLOAT, n=3)
    call.inputs[3][:] = 255
    call.inputs[4].view(np.int64)[1] = 299  # beyond vocab_range
    call.forward(toolkit.kernels(FORWARD, "sm_80"))
    assert call.outputs[0][1] == -math.inf
    assert np.isfinite(call.outputs[0][[0, 2]]).all()
