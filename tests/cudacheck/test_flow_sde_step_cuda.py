"""flow_sde_step's CUDA kernels: what nvcc made of them, run by the interpreter, gives the CPU's
bits; faults planted in them."""

import math
import re
import struct

import numpy as np
import pytest
import torch
from torch import Tensor

from cudacheck import toolkit
from cudacheck.emulator import FAULTS, emulated
from cudacheck.probing import aligned
from cudacheck.ptxsim import PtxError, run
from rlir.ops import flow_sde_step

SOURCE = toolkit.CSRC / "cuda" / "flow_sde_step.cu"
DTYPES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
SCHEDULES = {"flow_grpo": 0, "dance": 1, "cps": 2}
CHUNK = 4096


def latents(*shape: int, dtype: torch.dtype) -> list[Tensor]:
    g = torch.Generator().manual_seed(shape[-1])
    return [torch.randn(shape, generator=g).to(dtype) for _ in range(3)]


def array(x: Tensor) -> np.ndarray:
    return aligned(x.detach().contiguous().view(torch.uint8).numpy().ravel())


class Call:
    """Inputs and outputs of one step on arrays, and the structs that name them."""

    def __init__(
        self, dtype: torch.dtype, size: int, schedule: str, a: float, *, scored: bool
    ) -> None:
        self.dtype, self.size, self.scored = dtype, size, scored
        self.velocity, self.sample, self.later = latents(2, size, dtype=dtype)
        self.sigmas = [torch.tensor([0.9, 1.0]), torch.tensor([0.7, 0.8])]
        self.options = {"schedule": schedule, "noise_level": a, "seed": 5, "offset": 3}
        self.double = dtype == torch.float64
        self.chunks = -(-size // CHUNK)
        real = np.float64 if self.double else np.float32
        self.inputs = [array(t) for t in (self.velocity, self.sample, self.later, *self.sigmas)]
        self.numbers = [np.array([5]), np.array([3])]
        self.next = aligned(np.zeros_like(self.inputs[1]))
        self.mean = aligned(np.zeros(2 * size, real))
        self.logprob, self.std = np.zeros(2, real), np.zeros(2, real)
        self.partials = np.full(2 * self.chunks, np.nan)
        self.gradient = aligned(np.zeros(2 * size, real))
        self.slopes = np.array([1.0, -0.5], real)
        level = (SCHEDULES[schedule], a, math.sin(math.pi * a / 2))
        self.noise = struct.pack("<i4xdd", *level)

    def wanted(self) -> list[Tensor]:
        velocity = self.velocity.clone().requires_grad_()
        previous = self.later if self.scored else None
        step = flow_sde_step(velocity, self.sample, *self.sigmas, previous=previous, **self.options)
        (step.logprob * torch.from_numpy(self.slopes)).sum().backward()
        return [step.next, step.logprob.detach(), step.mean.detach(), step.std, velocity.grad]

    def _sigmas(self) -> bytes:
        pointers = [a.ctypes.data for a in self.inputs[3:]]
        return b"".join(struct.pack("<Qqi4x", p, 1, 1) for p in pointers)

    def forward(self) -> bytes:
        """struct FlowSdeStep of csrc/cuda/flow_sde_step.cuh."""
        velocity, sample, later = (a.ctypes.data for a in self.inputs[:3])
        outputs = (self.mean, self.logprob, self.std, self.partials)
        head = (velocity, sample, later if self.scored else 0)
        head += (0 if self.scored else self.next.ctypes.data,)
        head += tuple(a.ctypes.data for a in outputs)
        words = struct.pack("<8QQq", *head, 0, 0)
        words += struct.pack("<2Q2q", *(a.ctypes.data for a in self.numbers), 2, self.size)
        kind = DTYPES[self.dtype]
        tail = struct.pack("<3i?3x", kind, kind, kind, self.double)
        return words + self._sigmas() + self.noise + tail

    def backward(self) -> bytes:
        """struct FlowSdeBackward."""
        reached = self.inputs[2] if self.scored else self.next
        pointers = (reached.ctypes.data, self.mean.ctypes.data, 0, self.gradient.ctypes.data)
        words = struct.pack("<4Q2q", *pointers, 2, self.size)
        words += struct.pack("<Qqi4x", self.slopes.ctypes.data, 1, 0 if self.double else 1)
        tail = struct.pack("<i?3x", DTYPES[self.dtype], self.double)
        return words + self._sigmas() + self.noise + tail


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize(
    ("size", "schedule", "a", "scored"),
    [(70, "flow_grpo", 0.7, False), (4160, "cps", 0.8, False), (1028, "dance", 0.3, True)],
)
def test_ptx_gives_the_bits_of_the_cpu(
    arch: str, dtype: torch.dtype, size: int, schedule: str, a: float, scored: bool
) -> None:
    call = Call(dtype, size, schedule, a, scored=scored)
    kernels = toolkit.kernels(SOURCE, arch)
    name = "double" if call.double else "float"
    outputs = [call.mean, call.logprob, call.std, call.partials]
    outputs += [] if scored else [call.next]
    given = {"inputs": [*call.inputs, *call.numbers], "outputs": outputs}
    blocks = 2 * call.chunks
    wide = int(size % 4 == 0)
    step = kernels[f"step_kernel<{name}, {wide}>"]
    machine = run(step, [blocks], [256], [call.forward()], **given)
    run(kernels[f"finish_kernel<{name}>"], [2], [32], [call.forward()], **given)
    back = {"inputs": [*given["inputs"], call.mean, call.slopes], "outputs": [call.gradient]}
    back["inputs"] += [] if scored else [call.next]
    run(kernels[f"backward_kernel<{name}, {wide}>"], [blocks], [256], [call.backward()], **back)
    drawn, logprob, mean, std, gradient = call.wanted()
    if not scored:
        assert bytes(call.next) == bytes(array(drawn))
    assert bytes(call.mean) == bytes(array(mean))
    assert bytes(call.logprob) == bytes(array(logprob))
    assert bytes(call.std) == bytes(array(std))
    real = torch.from_numpy(call.gradient.reshape(2, size))
    assert real.to(dtype).equal(gradient)
    if wide:  # four elements at a time
        for access in ("ld", "st"):
            pattern = rf"{access}\.global\.(cg\.)?v[24]\."
            assert any(re.match(pattern, op) for op in machine.executed)


MESSAGES = {"NOISE": "race in shared memory", "BARRIER": "race in shared memory"}


@pytest.mark.parametrize("fault", [f.split(":")[1] for f in FAULTS if "flow_sde_step" in f])
def test_planted_faults_are_found(fault: str) -> None:
    v, x, _ = latents(1, 200, dtype=torch.float32)
    numbers = [torch.tensor([0.9]), torch.tensor([0.8]), None, torch.tensor(0), torch.tensor(0)]
    with (
        emulated(f"rlir_emu_flow_sde_step_{fault}", "random"),
        pytest.raises(RuntimeError, match=MESSAGES[fault]),
    ):
        torch.ops.rlir.flow_sde_step(v, x, *numbers, schedule="dance", noise_level=0.3)


@pytest.mark.parametrize("fault", MESSAGES)
def test_planted_faults_are_found_in_the_ptx(fault: str) -> None:
    call = Call(torch.float32, 200, "dance", 0.3, scored=False)
    step = toolkit.kernels(SOURCE, "sm_80", f"RLIR_FAULT_{fault}")["step_kernel<float, 1>"]
    outputs = [call.mean, call.next, call.partials]
    inputs = [*call.inputs, *call.numbers]
    with pytest.raises(PtxError, match="race"):
        run(step, [2], [256], [call.forward()], inputs=inputs, outputs=outputs)
