"""sample_tokens' CUDA kernel: what nvcc made of it, run by the interpreter, gives the CPU's bits; a
fault planted in it."""

import ctypes as c

import numpy as np
import pytest
import torch

from cudacheck import toolkit
from cudacheck.emulator import emulated
from cudacheck.probing import aligned
from cudacheck.ptxsim import PtxError, run
from rlir.ops import sample_tokens

SOURCE = toolkit.CSRC / "cuda" / "sample_tokens.cu"
DTYPES = {torch.float32: 1, torch.bfloat16: 2}


class Arguments(c.Structure):
    """struct SampleTokens of csrc/cuda/sample_tokens.cuh."""

    _fields_ = [
        ("logits", c.c_void_p),
        ("dtype", c.c_int32),
        *((name, c.c_int64) for name in ("rows", "row_stride", "token_stride")),
        *((name, c.c_int64) for name in ("tokens", "low", "high")),
        ("temperature", c.c_float),
        ("top_k", c.c_int64),
        ("top_p", c.c_double),
        ("min_p", c.c_double),
        ("seed_tensor", c.c_void_p),
        ("offset_tensor", c.c_void_p),
        ("seed", c.c_uint64),
        ("offset", c.c_uint64),
        ("row_ids", c.c_void_p),
        ("row_id_stride", c.c_int64),
        *((name, c.c_void_p) for name in ("token", "logprob", "entropy", "support", "space")),
    ]


class Call:
    """Inputs and outputs of one call on arrays, and the struct that names them."""

    def __init__(self, v: int, dtype: torch.dtype, options: dict, seed: int = 0) -> None:
        g = torch.Generator().manual_seed(seed)
        self.logits = (torch.randn(2, v, generator=g) * 2.5).to(dtype)
        self.options = options
        self.input = aligned(self.logits.view(torch.uint8).numpy().ravel())
        self.outputs = [np.zeros(2, np.int64), np.zeros(2, np.float32), np.zeros(2, np.float32)]
        self.outputs.append(np.zeros((2, -(-v // 8)), np.uint8))
        a = Arguments(logits=self.input.ctypes.data, dtype=DTYPES[dtype])
        a.rows, a.row_stride, a.token_stride, a.tokens = 2, v, 1, v
        a.low, a.high = options.get("vocab_range", (0, v))
        a.temperature = options.get("temperature", 1.0)
        a.top_k = options.get("top_k", 0)
        a.top_p, a.min_p = options.get("top_p", 1.0), options.get("min_p", 0.0)
        a.seed, a.offset = 11, 3
        a.token, a.logprob, a.entropy, a.support = (x.ctypes.data for x in self.outputs)
        self.given = bytes(a)
        first = a.low // 256 * 256
        self.shared = -(-(a.high - first) // 256) * (8 * 256 + 24)

    def run(self, kernel: object) -> object:
        options = {"inputs": [self.input], "outputs": self.outputs, "shared_bytes": self.shared}
        return run(kernel, [2], [512], [self.given], **options)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bf16"])
@pytest.mark.parametrize(
    ("v", "options"),
    [
        (1000, {"top_p": 0.8}),
        (520, {"top_k": 40, "top_p": 0.7, "min_p": 0.02, "temperature": 0.6}),
        (700, {"vocab_range": (5, 690), "top_k": 17}),
    ],
)
def test_ptx_gives_the_bits_of_the_cpu(
    arch: str, dtype: torch.dtype, v: int, options: dict
) -> None:
    call = Call(v, dtype, options)
    machine = call.run(toolkit.kernels(SOURCE, arch)["sample_kernel"])
    want = sample_tokens(call.logits, seed=11, offset=3, return_support=True, **options)
    for got, expected in zip(call.outputs, want, strict=True):
        assert got.tobytes() == expected.numpy().tobytes()
    assert any(op.startswith("ld.global.v4") for op in machine.executed)


def test_a_planted_fault_is_found() -> None:
    with (
        emulated("rlir_emu_sample_tokens_BARRIER", "random"),
        pytest.raises(RuntimeError, match=r"race in shared memory|never written"),
    ):
        torch.ops.rlir.sample_tokens(torch.zeros(1, 600), seed=0, offset=0, top_p=0.5)


def test_a_planted_fault_is_found_in_the_ptx() -> None:
    kernel = toolkit.kernels(SOURCE, "sm_80", "RLIR_FAULT_BARRIER")["sample_kernel"]
    with pytest.raises(PtxError, match=r"race|never written"):
        Call(600, torch.float32, {"top_p": 0.5}).run(kernel)
