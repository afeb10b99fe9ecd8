"""policy_loss' CUDA kernels: what nvcc made of them, run by the interpreter, gives the CPU's bits;
faults planted in them."""

import ctypes as c
import math
import re
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
from rlir.ops import policy_loss

sys.path.insert(0, str(Path(__file__).parents[1] / "ops"))
from policy_loss_cases import FIELDS, call, sample

SOURCE = toolkit.CSRC / "cuda" / "policy_loss.cu"
DTYPES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
DIVISIONS = {"grpo": 0, "bnpo": 1, "dr_grpo": 2, "dapo": 3, "cispo": 3}
ESTIMATORS = {"k1": 0, "k2": 1, "k3": 2}
MATRICES = ("logprob", "old_logprob", "advantages", "ref_logprob", "rollout_logprob")


class Matrix(c.Structure):
    _fields_ = [
        ("data", c.c_void_p),
        ("dtype", c.c_int32),
        ("row_stride", c.c_int64),
        ("stride", c.c_int64),
    ]


class Loss(c.Structure):
    """struct PolicyLoss of csrc/cpu/policy_loss.h."""

    _fields_ = [
        *((name, Matrix) for name in MATRICES),
        ("mask", c.c_void_p),
        *((name, c.c_int64) for name in ("mask_row_stride", "mask_stride", "rows", "columns")),
        *((name, c.c_bool) for name in ("float64", "cispo", "sequence")),
        ("kl", c.c_int32),
        ("kl_importance", c.c_bool),
        *((name, c.c_double) for name in ("low", "high", "delta", "kl_weight", "truncated")),
        ("division", c.c_int32),
    ]


class Number(c.Structure):
    _fields_ = [("data", c.c_void_p), ("kind", c.c_int32)]


class Forward(c.Structure):
    """struct PolicyLossForward of csrc/cuda/policy_loss.cuh."""

    _fields_ = [
        ("f", Loss),
        ("given", c.c_double),
        ("normalizer", Number),
        *((name, c.c_void_p) for name in ("rows", "loss", "statistics", "scales")),
    ]


class Backward(c.Structure):
    """struct PolicyLossBackward."""

    _fields_ = [("f", Loss), ("grad", Number), ("scales", c.c_void_p), ("gradient", c.c_void_p)]


class Call:
    """Inputs and outputs of one call on arrays, and the structs that name them."""

    def __init__(self, x: dict[str, Tensor], options: dict) -> None:
        self.x, self.options = x, options
        p = x["logprob"]
        rows, columns = p.shape
        self.double = p.dtype == torch.float64
        real = np.float64 if self.double else np.float32
        cispo = options["loss_type"] == "cispo"
        self.arrays = {
            k: aligned(v.contiguous().view(torch.uint8).numpy().ravel()) for k, v in x.items()
        }
        f = Loss(rows=rows, columns=columns, float64=self.double, cispo=cispo)
        for name in MATRICES:
            stride = x[name].shape[1]
            matrix = Matrix(self.arrays[name].ctypes.data, DTYPES[x[name].dtype], stride)
            matrix.stride = 0 if stride == 1 else 1
            setattr(f, name, matrix)
        f.mask, f.mask_row_stride, f.mask_stride = self.arrays["mask"].ctypes.data, columns, 1
        f.sequence = options["importance_level"] == "sequence"
        f.kl, f.kl_importance = ESTIMATORS[options["kl_estimator"]], options["kl_importance"]
        f.low, f.high = (-math.inf, options["clip_high"]) if cispo else (0.8, 1.3)
        f.delta = math.inf if cispo else options["delta"]
        f.kl_weight, f.truncated = options["kl_weight"], options["truncated_importance"]
        f.division = DIVISIONS[options["loss_type"]]
        self.f = f
        self.rows, self.scales = np.zeros((rows, 17)), np.zeros((3, rows))
        self.loss, self.statistics = np.zeros(1, real), np.zeros(13, real)
        self.gradient = aligned(np.zeros_like(self.arrays["logprob"]))
        self.outer = np.ones(1, np.float32)

    def token(self) -> bytes:
        """struct Token of csrc/cpu/policy_loss_token.h."""
        bounds = [self.f.low, self.f.high, self.f.delta, self.f.truncated, 20.0, 0.0, 1.0]
        packed = np.array(bounds, np.float64 if self.double else np.float32).tobytes()
        tail = bytes(c.c_int32(self.f.kl)) + bytes([self.f.cispo, 0, 0, 0])
        return packed + tail

    def forward(self, kernels: dict) -> object:
        a = Forward(f=self.f)
        a.rows, a.scales = self.rows.ctypes.data, self.scales.ctypes.data
        a.loss, a.statistics = self.loss.ctypes.data, self.statistics.ctypes.data
        given = [*self.arrays.values()]
        rows, columns = self.x["logprob"].shape
        kernel = kernels[f"row_kernel<{self.real}, {int(columns % 4 == 0)}>"]
        words = [bytes(a), self.token()]
        machine = run(kernel, [rows], [256], words, inputs=given, outputs=[self.rows])
        outputs = [self.loss, self.statistics, self.scales]
        finish = kernels[f"finish_kernel<{self.real}>"]
        run(finish, [1], [256], words[:1], inputs=[self.rows], outputs=outputs)
        return machine

    def backward(self, kernels: dict) -> None:
        a = Backward(f=self.f, grad=Number(self.outer.ctypes.data, 1))
        a.scales, a.gradient = self.scales.ctypes.data, self.gradient.ctypes.data
        rows, columns = self.x["logprob"].shape
        kernel = kernels[f"backward_kernel<{self.real}, {int(columns % 4 == 0)}>"]
        given = [*self.arrays.values(), self.outer, self.scales]
        words = [bytes(a), self.token()]
        run(
            kernel,
            [rows * -(-columns // 1024)],
            [256],
            words,
            inputs=given,
            outputs=[self.gradient],
        )

    @property
    def real(self) -> str:
        return "double" if self.double else "float"


def case(shape: tuple[int, int], dtype: torch.dtype, **more: object) -> Call:
    options = {"loss_type": "grpo", "importance_level": "token", "clip_high": 0.3, "delta": 1.5}
    options |= {"kl_weight": 0.1, "kl_estimator": "k3", "kl_importance": False}
    options["truncated_importance"] = 1.1
    x = sample(*shape, dtype)
    if more.pop("one_advantage", False):
        x["advantages"] = x["advantages"][:, :1]
    return Call(x, options | more)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize(
    ("shape", "more"),
    [
        ((2, 300), {"one_advantage": True}),
        ((2, 70), {"importance_level": "sequence", "kl_importance": True, "loss_type": "dapo"}),
        ((1, 132), {"loss_type": "cispo", "kl_estimator": "k2"}),
    ],
)
def test_ptx_gives_the_bits_of_the_cpu(
    arch: str, dtype: torch.dtype, shape: tuple[int, int], more: dict
) -> None:
    made = case(shape, dtype, **more)
    kernels = toolkit.kernels(SOURCE, arch)
    machine = made.forward(kernels)
    made.backward(kernels)
    loss, gradient, seen = call(policy_loss, made.x, **made.options)
    assert bytes(made.loss) == loss.numpy().tobytes()
    assert bytes(made.statistics) == torch.stack([seen[name] for name in FIELDS]).numpy().tobytes()
    assert bytes(made.gradient) == gradient.view(torch.uint8).numpy().tobytes()
    if shape[1] % 4 == 0:  # four tokens at a time
        pattern = r"ld\.(global|shared)\.(cg\.|nc\.)?v[24]\."
        assert any(re.match(pattern, op) for op in machine.executed)


MESSAGES = {"WARP": "race in shared memory|never written", "BARRIER": "race in shared memory"}


def test_every_fault_has_its_message() -> None:
    assert {f.split(":")[1] for f in FAULTS if f.startswith("policy_loss")} == set(MESSAGES)


@pytest.mark.parametrize("fault", MESSAGES)
def test_planted_faults_are_found(fault: str) -> None:
    x = sample(1, 300, torch.float32)
    with (
        emulated(f"rlir_emu_policy_loss_{fault}", "random"),
        pytest.raises(RuntimeError, match=MESSAGES[fault]),
    ):
        torch.ops.rlir.policy_loss(x["logprob"], x["old_logprob"], x["advantages"])


@pytest.mark.parametrize("fault", MESSAGES)
def test_planted_faults_are_found_in_the_ptx(fault: str) -> None:
    kernels = toolkit.kernels(SOURCE, "sm_80", f"RLIR_FAULT_{fault}")
    with pytest.raises(PtxError, match=r"race|never written"):
        case((1, 300), torch.float32).forward(kernels)
