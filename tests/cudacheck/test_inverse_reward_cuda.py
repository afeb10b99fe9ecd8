"""inverse_reward's CUDA kernel: what nvcc made of it, run by the interpreter, gives the CPU's bits;
a fault planted in it."""

import ctypes as c
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from cudacheck import toolkit
from cudacheck.emulator import emulated
from cudacheck.heads import Heads, heads_struct
from cudacheck.probing import aligned
from cudacheck.ptxsim import PtxError, run
from rlir.actions import MINECRAFT_VPT
from rlir.ops import Actions, inverse_reward

sys.path.insert(0, str(Path(__file__).parents[1] / "ops"))
from action_cases import HEADS, commands_of, logits_of

SOURCE = toolkit.CSRC / "cuda" / "inverse_reward.cu"
DTYPES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}


class Arguments(c.Structure):
    """struct InverseReward of csrc/cuda/inverse_reward.cuh."""

    _fields_ = [
        ("heads", Heads),
        *((name, c.c_int64) for name in ("trajectories", "frames")),
        ("actions", c.c_void_p),
        ("action_strides", c.c_int64 * 3),
        ("degrees", c.c_void_p),
        ("degree_strides", c.c_int64 * 3),
        ("mask", c.c_void_p),
        ("mask_strides", c.c_int64 * 2),
        ("command_sizes", c.c_int32 * 64),
        ("command_offsets", c.c_int32 * 64),
        ("command_classes", c.c_int32 * 1024),
        ("edge_offsets", c.c_int32 * 64),
        ("edges", c.c_double * 256),
        ("weights", c.c_double * 64),
        ("total_weight", c.c_double),
        ("reward", c.c_void_p),
        ("matches", c.c_void_p),
        ("joint", c.c_bool),
    ]


class Call:
    """Inputs and outputs of one call on arrays, and the struct that names them."""

    def __init__(self, name: str, dtype: torch.dtype, *, degrees: bool, joint: bool) -> None:
        self.heads, shape = HEADS[name], (3, 7)
        self.keys, self.camera = logits_of(self.heads, *shape, dtype=dtype)
        first = self.camera if self.keys is None else self.keys
        assert first is not None
        first[1, 2, 3] = torch.nan
        self.commands = commands_of(self.heads, *shape)
        axes, tables = len(self.heads.axes), self.heads.tables
        self.turned = torch.linspace(-9, 9, 21 * axes).view(*shape, axes) if degrees else None
        self.mask = torch.arange(21).view(shape) % 5 != 1
        self.joint = joint
        self.weights = [0.1 * f + 0.3 for f in range(self.commands.shape[-1])]
        logits = [self.keys, self.camera]
        arrays = [
            aligned(np.zeros(16, np.uint8) if x is None else x.view(torch.uint8).numpy().ravel())
            for x in logits
        ]
        widths = tuple(0 if x is None else x.shape[-1] for x in logits)
        self.reward = np.zeros(3, np.float32)
        self.matches = np.zeros(self.commands.shape, np.float32)
        a = Arguments(heads=heads_struct(self.heads, *arrays, DTYPES[dtype], 7, widths))
        a.trajectories, a.frames = shape
        a.actions = self.commands.data_ptr()
        a.action_strides[:] = self.commands.stride()
        self.inputs = [*arrays, self.commands.numpy(), self.mask.numpy()]
        if self.turned is not None:
            a.degrees = self.turned.data_ptr()
            a.degree_strides[:] = self.turned.stride()
            self.inputs.append(self.turned.numpy())
        a.mask = self.mask.data_ptr()
        a.mask_strides[:] = self.mask.stride()
        start = edge = 0
        for f, size in enumerate(tables.command_sizes):
            a.command_sizes[f], a.command_offsets[f] = size, start
            a.edge_offsets[f], a.weights[f] = edge, self.weights[f]
            start += size
            edge += (tables.axis_sizes[f] - 1) // 2 if f < axes else 0
        a.command_classes[:start] = tables.command_classes
        a.edges[: len(tables.edges)] = tables.edges
        for w in self.weights:
            a.total_weight += w
        a.reward, a.matches = self.reward.ctypes.data, self.matches.ctypes.data
        a.joint = joint
        self.given = bytes(a)

    def run(self, kernel: object) -> None:
        outputs = [self.reward, self.matches]
        run(kernel, [3], [128], [self.given], inputs=self.inputs, outputs=outputs)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize(
    ("name", "degrees", "joint"),
    [("vpt", True, False), ("many", False, False), ("minecraft", False, True)],
)
def test_ptx_gives_the_bits_of_the_cpu(
    arch: str, dtype: torch.dtype, name: str, degrees: bool, joint: bool
) -> None:
    call = Call(name, dtype, degrees=degrees, joint=joint)
    real = "double" if dtype == torch.float64 else "float"
    call.run(toolkit.kernels(SOURCE, arch)[f"reward_kernel<{real}>"])
    actions = call.commands if call.turned is None else Actions(call.commands, call.turned)
    reward, matches = inverse_reward(
        call.keys,
        call.camera,
        actions,
        call.heads,
        mode="joint" if joint else "factor",
        weights=call.weights,
        frame_mask=call.mask,
    )
    # The sign of a NaN is the compiler's choice.
    np.testing.assert_array_equal(call.reward, reward.numpy())
    np.testing.assert_array_equal(call.matches, matches.numpy())


def test_a_planted_fault_is_found() -> None:
    t = MINECRAFT_VPT.tables
    keys, camera = logits_of(MINECRAFT_VPT, 2, 6)
    commands = commands_of(MINECRAFT_VPT, 2, 6)
    names = ("axis_sizes", "group_sizes", "button_classes", "button_opponents", "edges")
    options = {n: getattr(t, n) for n in (*names, "command_sizes", "command_classes")}
    with (
        emulated("rlir_emu_inverse_reward_BARRIER", "random"),
        pytest.raises(RuntimeError, match=r"race in shared memory|never written"),
    ):
        torch.ops.rlir.inverse_reward(keys, camera, commands, **options, weights=[1.0] * 9)


def test_a_planted_fault_is_found_in_the_ptx() -> None:
    call = Call("vpt", torch.float32, degrees=False, joint=False)
    kernel = toolkit.kernels(SOURCE, "sm_80", "RLIR_FAULT_BARRIER")["reward_kernel<float>"]
    with pytest.raises(PtxError, match=r"race|never written"):
        call.run(kernel)
