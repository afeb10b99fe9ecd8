"""Tile instructions for tests: the processor's, or those of csrc/emu/amx.cpp where it has none.

``tiles()`` is a context in which the build for AMX can be asked for (``instruction_set("amx")``).
Its machine code runs as it is: an instruction that the processor refuses raises SIGILL, and the
handler does it. docs/amx_without_amx.md has what that shows and what it does not.
"""

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from rlir import _build_info, _library

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "amx"
PROBES = Path(__file__).parent / "probes"
PLANTS = {"truncates": 1, "keeps subnormals": 2, "swaps rows": 3, "adds odd first": 4}
"""Faults that the emulator itself can have planted."""
_AVX512 = ("-march=x86-64-v4", "-mprefer-vector-width=512")
AMX = (*_AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16", "-DRLIR_X86", "-DRLIR_ISA=amx")
"""As CMakeLists.txt compiles the build for AMX."""


def real() -> bool:
    """Whether the processor has tiles and the system lends them."""
    return _build_info.detected_cpu_isa() == "amx"


def amx_ops() -> list[str]:
    """Ops with a build for AMX."""
    sources = sorted((ROOT / "csrc" / "ops").glob("*.cpp"))
    return [p.stem for p in sources if "RLIR_CPU_KERNEL_AMX(" in p.read_text()]


def _compiler() -> str | None:
    names = (os.environ.get("CXX"), "c++", "g++", "clang++")
    return next((path for name in names if name and (path := shutil.which(name))), None)


@functools.cache
def missing() -> str:
    """Why there are no tiles here, real or emulated; empty if there are."""
    if _library.PATH is None or "amx" not in _build_info.cpu_isas:
        return "there is no build for AMX"
    if real():
        return ""
    if platform.machine() != "x86_64" or _build_info.detected_cpu_isa() != "avx512_bf16":
        return "no AMX, and without AVX512_BF16 its emulator would not do: the build has both"
    return "" if _compiler() else "no AMX, and no compiler for its emulator"


@functools.cache
def compiled(source: Path, *flags: str) -> ctypes.CDLL:
    """A library of one source file, kept in build/amx until something it is made of changes."""
    compiler = _compiler()
    assert compiler is not None
    command = [compiler, "-std=c++20", "-shared", "-fPIC", "-O3", "-ffp-contract=off", "-Wall"]
    command += ["-Wno-psabi", "-fvisibility=hidden", f"-I{ROOT / 'csrc'}", *flags, str(source)]
    made_of = [*sorted((ROOT / "csrc" / "cpu").glob("*.h")), *(ROOT / "csrc" / "core").glob("*.h")]
    contents = "\n".join([*command, *(p.read_text() for p in (source, *made_of))])
    path = BUILD / f"lib{source.stem}-{hashlib.sha256(contents.encode()).hexdigest()[:16]}.so"
    BUILD.mkdir(parents=True, exist_ok=True)
    with (BUILD / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one test process builds, others wait
        if not path.exists():
            done = subprocess.run(
                [*command, "-o", str(path)], capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, done.stderr[-6000:]
    return ctypes.CDLL(str(path))


def runtime(name: str) -> str | None:
    """The compiler's library of that name."""
    compiler = _compiler()
    assert compiler is not None
    command = [compiler, f"-print-file-name={name}"]
    found = Path(subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip())
    return str(found.resolve()) if found.is_absolute() else None


@functools.cache
def emulator() -> ctypes.CDLL:
    library = compiled(ROOT / "csrc" / "emu" / "amx.cpp", *_AVX512)
    library.rlir_amx_executed.restype = ctypes.c_uint64
    return library


def executed() -> int:
    """Tile instructions that the emulator did so far."""
    return int(emulator().rlir_amx_executed())


@contextlib.contextmanager
def tiles() -> Iterator[None]:
    """Tile instructions work here."""
    if not real():
        assert emulator().rlir_amx_install() == 0  # and stays: nothing else raises SIGILL
        assert ctypes.CDLL(str(_library.PATH)).rlir_amx_is_emulated() == 1
    yield


@contextlib.contextmanager
def planted(fault: str) -> Iterator[None]:
    """The emulator has a fault here."""
    emulator().rlir_amx_plant(PLANTS[fault])
    try:
        yield
    finally:
        emulator().rlir_amx_plant(0)
