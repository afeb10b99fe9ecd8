"""The emulator of CUDA for tests: builds it, loads it, lets ops run on it.

``emulated("plain")`` and ``emulated("checked")`` are contexts in which every op that has a CUDA
kernel runs that kernel, and the host code around it, on CPU tensors in place of its CPU kernel:
public functions, autograd and all else stay as they are. What the checked one finds is raised as a
RuntimeError by the op.
"""

import contextlib
import ctypes
import fcntl
import functools
import os
import platform
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from rlir import _library

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "emu"
PROBES = sorted((Path(__file__).parent / "probes").glob("*.cu"))
FAULTS = (
    *("flow_sde_step:NOISE", "flow_sde_step:BARRIER"),
    *("inverse_reward:BARRIER", "sample_tokens:BARRIER"),
    *("policy_loss:WARP", "policy_loss:BARRIER"),
    *("selected_logprob:COPY_WAIT", "selected_logprob:COPY_BARRIER"),
    "selected_logprob_backward:TILE",
    *("video_attention:COPY_WAIT", "video_attention:COPY_BARRIER"),
    *("video_attention:WARP", "video_attention:MASK", "group_decode_attention:CHUNK"),
    *("video_attention_backward:ROWS_BARRIER", "video_attention_backward:QUERIES_BARRIER"),
    *("video_attention_backward:KEYS_BARRIER", "video_attention_backward:MASK"),
    *("group_advantage:TAIL", "group_advantage:WAIT", "group_advantage:BARRIER"),
)
"""Faults that a kernel's own file can have planted (RLIR_FAULT_<name>), as "op:name"."""
ORDERS = {"fifo": 0, "lifo": 1, "random": 2}


def _tool(name: str) -> str:
    """A build tool of the virtual environment, or of the path."""
    folders = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    found = shutil.which(name, path=folders)
    if found is None:
        pytest.skip(f"{name} is not installed: the emulator of CUDA cannot be built")
    return found


@functools.cache
def build() -> Path:
    """Build what is out of date; returns the folder of the libraries."""
    if platform.machine() != "x86_64":
        pytest.skip("the emulator of CUDA switches stacks in x86-64 assembly")
    cmake, ninja = _tool("cmake"), _tool("ninja")
    options = [
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-DRLIR_EMU_FAULTS={';'.join(FAULTS)}",
        f"-DRLIR_EMU_PROBES={';'.join(map(str, PROBES))}",
        "-DCMAKE_BUILD_TYPE=",
    ]
    BUILD.mkdir(parents=True, exist_ok=True)
    with (BUILD / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one test process builds, others wait
        made_for = BUILD / "options"
        wanted = "\n".join([*options, torch.__version__])
        if not made_for.exists() or made_for.read_text() != wanted:
            folders = ["-S", str(ROOT / "csrc" / "emu"), "-B", str(BUILD)]
            _run(cmake, *folders, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}", *options)
            made_for.write_text(wanted)
        _run(ninja, "-C", str(BUILD))
    return BUILD


def _run(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout[-6000:]}\n{done.stderr[-6000:]}"


class Emulator:
    """One built library: ``rlir_emu``, ``rlir_emu_checked``, a faulty one or a probe."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.path = build() / f"lib{name}.so"
        self.library = ctypes.CDLL(str(self.path))
        self.library.rlir_emu_error.restype = ctypes.c_char_p
        self.library.rlir_emu_profile.restype = ctypes.c_char_p

    def configure(
        self, order: str = "fifo", seed: int = 1, *, late: bool = True, profile: int = -1
    ) -> None:
        """``order`` of threads and blocks; ``late``: cp.async lands at its wait and not at once;
        ``profile``: the block whose memory accesses are counted."""
        self.library.rlir_emu_configure(
            ctypes.c_int(ORDERS[order]),
            ctypes.c_uint64(seed),
            ctypes.c_int(late),
            ctypes.c_int(profile),
        )

    @property
    def instrumented(self) -> bool:
        return bool(self.library.rlir_emu_instrumented())

    def error(self) -> str:
        """What the last launch found; empty if nothing."""
        return self.explain(self.library.rlir_emu_error().decode())

    def explain(self, text: str) -> str:
        """Code addresses, @hex, to file:line where binutils is installed."""
        codes = sorted(set(re.findall(r"@([0-9a-f]+)", text)))
        if not codes or shutil.which("addr2line") is None:
            return text
        calls = [hex(max(int(code, 16) - 1, 0)) for code in codes]
        words = ["addr2line", "-e", str(self.path), *calls]
        places = subprocess.run(words, capture_output=True, text=True, check=True).stdout.split(
            "\n"
        )
        known = dict(zip(codes, (p.split(" ")[0] for p in places), strict=False))
        return re.sub(r"@([0-9a-f]+)", lambda m: f"at {known[m[1]]}", text)

    def profile(self) -> list["Place"]:
        """Memory accesses of the profiled block in the last launch, by place in the code."""
        lines = self.library.rlir_emu_profile().decode().splitlines()
        return [Place.parse(self.explain(line)) for line in lines]


@dataclass(frozen=True)
class Place:
    """A place in the code that accesses memory."""

    where: str
    space: str
    """"shared" or "global"."""
    kind: str
    """"read" or "write"."""
    bytes: int
    requests: int
    """Times that a warp came by."""
    ratio: float
    """Wavefronts (shared) or sectors (global) over the fewest possible; 1 is best."""

    @staticmethod
    def parse(line: str) -> "Place":
        *where, space, kind, size, requests, ratio = line.split()
        return Place(" ".join(where), space, kind, int(size), int(requests), float(ratio))


@functools.cache
def load(name: str) -> Emulator:
    """Load an emulator with ops: they appear as ``torch.ops.<name>``."""
    torch.ops.load_library(str(build() / f"lib{name}.so"))
    return Emulator(name)


def cuda_ops(listed: str = "OPS") -> list[str]:
    """Ops that have a CUDA kernel (csrc/cuda/ops.cmake); or its other list, of PARTS of ops."""
    text = (ROOT / "csrc" / "cuda" / "ops.cmake").read_text()
    found = re.search(rf"^set\(RLIR_CUDA_{listed} ([^)]*)\)", text, re.MULTILINE)
    assert found is not None
    return found[1].split()


def operators(name: str) -> list[str]:
    """Operators that a loaded emulator registers: an op may have several (its backward)."""
    return sorted(
        schema.split("::", 1)[1]
        for schema in torch._C._dispatch_get_all_op_names()
        if schema.startswith(f"{name}::")
    )


KINDS = {"plain": "rlir_emu", "checked": "rlir_emu_checked"}


@contextlib.contextmanager
def emulated(kind: str = "plain", order: str = "fifo", seed: int = 1) -> Iterator[Emulator]:
    """Ops run their CUDA kernels in the emulator. ``kind``: plain, checked, or a library's name."""
    assert _library.PATH is not None
    emulator = load(KINDS.get(kind, kind))
    emulator.configure(order, seed)
    override = torch.library.Library("rlir", "IMPL")
    try:
        for operator in operators(emulator.name):
            packet, _, overload = operator.partition(".")
            kernel = getattr(getattr(torch.ops, emulator.name), packet)
            function = getattr(kernel, overload or "default")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that a kernel is overridden
                override.impl(operator, function, "CPU", allow_override=True)
        yield emulator
    finally:
        override._destroy()
        emulator.configure()
