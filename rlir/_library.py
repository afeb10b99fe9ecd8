"""Loads the compiled op library, which registers ``torch.ops.rlir``, and its CUDA kernels.

Environment variables for tests and for tracking down a fault: ``RLIR_FORCE_REFERENCE=1`` makes
every op run its plain PyTorch reference (the library need not even be there), ``RLIR_CPU_ISA`` caps
the instruction set of the kernels, ``RLIR_OPS_LIBRARY`` is an op library to load in place of the
installed one (tools/sanitize.py).
"""

import importlib.util
import os
from pathlib import Path

import torch

from rlir.errors import InputError

CPU_ISAS = ("baseline", "avx2", "avx512", "avx512_bf16", "amx")
"""Instruction sets, lowest first: the names RLIR_CPU_ISA may have."""

FORCE_REFERENCE = os.environ.get("RLIR_FORCE_REFERENCE", "0") not in ("", "0")
"""Whether ops run their plain PyTorch reference."""

_BUILD = "pip install --no-build-isolation -e . (in rlir's source)"


def load() -> Path:
    """Load the op library and return where it is. ImportError says what to do if it fails."""
    isa = os.environ.get("RLIR_CPU_ISA")
    if isa is not None and isa not in CPU_ISAS:
        raise InputError(f"RLIR_CPU_ISA must be one of {', '.join(CPU_ISAS)}, got {isa!r}")
    info = importlib.util.find_spec("rlir._build_info")
    if info is None or info.origin is None:
        raise ImportError(f"rlir: the native library is not built; run: {_BUILD}")
    other = os.environ.get("RLIR_OPS_LIBRARY")
    path = Path(other) if other else Path(info.origin).with_name("librlir_ops.so")
    if other and not path.exists():
        raise InputError(f"RLIR_OPS_LIBRARY must be an op library, found no file {other}")
    if not path.exists():
        raise ImportError(f"rlir: {path.name} is missing beside _build_info; run: {_BUILD}")
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise ImportError(
            f"rlir: {path.name} does not load in torch {torch.__version__}: {reason}; "
            f"rebuild it with: {_BUILD}"
        ) from None
    return path


def load_cuda(ops: Path) -> Path | None:
    """Load the CUDA kernels beside the op library, if they were built and torch sees a GPU."""
    path = ops.with_name("librlir_cuda.so")
    if not path.exists() or not torch.cuda.is_available():
        return None
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise ImportError(
            f"rlir: {path.name} does not load in torch {torch.__version__}: {reason}; "
            f"rebuild it with: {_BUILD}"
        ) from None
    return path


PATH: Path | None = None if FORCE_REFERENCE else load()
"""Where the loaded library is; None if the reference is forced."""

CUDA: Path | None = None if PATH is None else load_cuda(PATH)
"""Where the loaded CUDA kernels are; None without a GPU, or if they were not built."""


def has_kernels(tensor: torch.Tensor) -> bool:
    """Whether native kernels take this tensor, for an op that has CUDA kernels."""
    kind = tensor.device.type
    return PATH is not None and (kind == "cpu" or (kind == "cuda" and CUDA is not None))
