"""decode_actions' CUDA kernel: what nvcc made of it, run by the interpreter, gives the CPU's
bits."""

import ctypes as c
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from cudacheck import toolkit
from cudacheck.heads import Heads, heads_struct
from cudacheck.probing import aligned
from cudacheck.ptxsim import run
from rlir.ops import decode_actions

sys.path.insert(0, str(Path(__file__).parents[1] / "ops"))
from action_cases import HEADS, logits_of

SOURCE = toolkit.CSRC / "cuda" / "decode_actions.cu"
DTYPES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}


class Arguments(c.Structure):
    """struct DecodeActions of csrc/cuda/decode_actions.cuh."""

    _fields_ = [
        ("heads", Heads),
        ("centres", c.c_float * 512),
        *((name, c.c_int64) for name in ("rows", "frames")),
        *((name, c.c_void_p) for name in ("classes", "degrees")),
    ]


def array(x: Tensor | None) -> np.ndarray:
    """At least 16 bytes: a space may have no keys."""
    data = np.zeros(16, np.uint8) if x is None else x.contiguous().view(torch.uint8).numpy().ravel()
    return aligned(data)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("name", ["vpt", "many", "wide", "minecraft"])
def test_ptx_gives_the_bits_of_the_cpu(arch: str, dtype: torch.dtype, name: str) -> None:
    heads, shape = HEADS[name], (3, 12)
    keys, camera = logits_of(heads, *shape, dtype=dtype)
    for x in (keys, camera):
        if x is not None:
            x[1, 2, -1] = torch.nan
    want = decode_actions(keys, camera, heads)
    arrays = array(keys), array(camera)
    widths = tuple(0 if x is None else x.shape[-1] for x in (keys, camera))
    classes, degrees = np.zeros(want.classes.shape, np.int64), np.zeros(want.degrees.shape, "f4")
    degrees = degrees if degrees.size else np.zeros(1, "f4")
    given = Arguments(heads=heads_struct(heads, *arrays, DTYPES[dtype], shape[1], widths))
    for i, centre in enumerate(heads.tables.centres):
        given.centres[i] = centre
    given.rows, given.frames = shape[0] * shape[1], shape[1]
    given.classes, given.degrees = classes.ctypes.data, degrees.ctypes.data
    real = "double" if dtype == torch.float64 else "float"
    kernel = toolkit.kernels(SOURCE, arch)[f"decode_kernel<{real}>"]
    run(kernel, [2], [256], [bytes(given)], inputs=list(arrays), outputs=[classes, degrees])
    assert torch.from_numpy(classes).equal(want.classes)
    if want.degrees.numel():
        assert degrees.tobytes() == want.degrees.numpy().tobytes()
