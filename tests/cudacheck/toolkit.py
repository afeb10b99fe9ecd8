"""nvcc, ptxas and nvdisasm for tests: PTX, resources, machine code. None of it needs a GPU.

What was made is kept in build/ptx under a name that holds a digest of the sources.
"""

import functools
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from cudacheck.ptxsim import Kernel, parse

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
CACHE = ROOT / "build" / "ptx"
ARCHS = ("sm_80", "sm_90", "sm_100", "sm_120")


def tool(name: str) -> str:
    """A program of the CUDA toolkit; the test is skipped without it."""
    homes = [os.environ.get("CUDA_HOME", ""), os.environ.get("CUDA_PATH", ""), "/usr/local/cuda"]
    folders = [str(Path(home) / "bin") for home in homes if home]
    found = shutil.which(name) or shutil.which(name, path=os.pathsep.join(folders))
    if found is None:
        pytest.skip(f"{name} of the CUDA toolkit is not installed")
    return found


def disassembler() -> str | None:
    """nvdisasm of the toolkit or of the package nvidia-cuda-nvdisasm, if it is there."""
    found = shutil.which("nvdisasm")
    package = importlib.util.find_spec("nvidia")
    for folder in package.submodule_search_locations or [] if package is not None else []:
        for path in sorted(Path(folder).glob("*/bin/nvdisasm")):
            found = found or str(path)
    return found


def _made(name: str, content: bytes, command: list[str], *, report: bool = False) -> Path:
    """The output file of a command, which gets its path appended; made if it is not there."""
    digest = hashlib.sha256(content + " ".join(command).encode()).hexdigest()[:16]
    path = CACHE / f"{digest}-{name}"
    log = path.with_name(path.name + ".log")
    if not path.exists() or (report and not log.exists()):
        CACHE.mkdir(parents=True, exist_ok=True)
        for old in CACHE.glob(f"*-{name}*"):
            old.unlink(missing_ok=True)
        part = path.with_name(f"{path.name}.{os.getpid()}")
        done = subprocess.run(
            [*command, "-o", str(part)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"
        log.write_text(done.stderr + done.stdout)
        part.rename(path)
    return path


@functools.cache
def _headers() -> bytes:
    folders = ("cuda", "core", "cpu")
    files = [p for f in folders for p in sorted((CSRC / f).iterdir()) if p.suffix in (".h", ".cuh")]
    files += sorted(Path(__file__).parent.glob("probes/*.cuh"))
    return b"".join(p.name.encode() + p.read_bytes() for p in files)


@functools.cache
def ptx(source: Path, arch: str, *definitions: str) -> str:
    """PTX of a .cu file for one architecture."""
    nvcc = tool("nvcc")
    words = [nvcc, "-std=c++20", "-O3", "-fmad=false", "-lineinfo", f"-arch={arch}", "-ptx"]
    words += [
        f"-I{CSRC}",
        f"-I{Path(__file__).parent / 'probes'}",
        *(f"-D{d}" for d in definitions),
    ]
    name = "-".join([source.stem, *definitions, arch]) + ".ptx"
    content = _headers() + source.read_bytes()
    return _made(name, content, [*words, str(source)]).read_text()


@functools.cache
def kernels(source: Path, arch: str, *definitions: str) -> dict[str, Kernel]:
    """The kernels of a .cu file, for the interpreter, by readable name."""
    return {readable(n): k for n, k in parse(ptx(source, arch, *definitions)).items()}


BUILTIN = {"d": "double", "f": "float", "i": "int", "j": "unsigned", "b": "bool", "l": "long"}


def readable(mangled: str) -> str:
    """tile_kernel<float> of a mangled name: the last name and its template arguments. What is not
    mangled stays as it is."""
    names, rest = [], mangled.removeprefix("_ZN").removeprefix("_Z")
    if rest == mangled:
        return mangled
    while match := re.match(r"(\d+)", rest):
        end = match.end() + int(match[1])
        names.append(rest[match.end() : end])
        rest = rest[end:]
    if not names or not rest.startswith("I"):
        return names[-1] if names else mangled
    arguments, rest = [], rest[1:]
    while rest and not rest.startswith("E"):
        if literal := re.match(r"L[a-z](n?\d+)E", rest):  # Li16E, Lb1E
            arguments.append(literal[1].replace("n", "-"))
            rest = rest[literal.end() :]
        elif nested := re.match(r"N(?:S\d*_|\d+\D\w*?)*?(\d+)(?=[A-Z])", rest):  # NS_7Float16E
            end = nested.end() + int(nested[1])
            arguments.append(rest[nested.end() : end])
            rest = rest[end:].removeprefix("E")
        elif rest[0] in BUILTIN:
            arguments.append(BUILTIN[rest[0]])
            rest = rest[1:]
        else:
            return mangled
    return f"{names[-1]}<{', '.join(arguments)}>"


@dataclass(frozen=True)
class Usage:
    """What one thread or block of a kernel needs."""

    registers: int
    spilled: int
    """Bytes of spill stores and loads."""
    stack: int
    shared: int
    """Bytes of static shared memory."""


@functools.cache
def usage(source: Path, arch: str) -> dict[str, Usage]:
    """What ptxas says of the kernels of a .cu file, by readable name."""
    text = cubin(source, arch).with_name(cubin(source, arch).name + ".log").read_text()
    pattern = re.compile(
        r"Compiling entry function '(\S+)'.*?\n.*?Function properties.*?\n"
        r"\s+(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\n"
        r".*?Used (\d+) registers([^\n]*)"
    )
    found = {}
    for name, stack, stores, loads, registers, rest in pattern.findall(text):
        shared = re.search(r"(\d+) bytes smem", rest)
        found[readable(name)] = Usage(
            int(registers), int(stores) + int(loads), int(stack), int(shared[1]) if shared else 0
        )
    return found


@functools.cache
def cubin(source: Path, arch: str) -> Path:
    """Machine code of a .cu file, and beside it (.log) what ptxas says of it."""
    text = ptx(source, arch)
    path = CACHE / f"{source.stem}-{arch}.in.ptx"
    CACHE.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    words = [tool("ptxas"), "-v", f"-arch={arch}", str(path)]
    return _made(f"{source.stem}-{arch}.cubin", text.encode(), words, report=True)


@functools.cache
def machine_code(source: Path, arch: str) -> dict[str, list[str]]:
    """Opcodes (SASS) of the kernels of a .cu file, by readable name; empty without nvdisasm."""
    program = disassembler()
    if program is None:
        return {}
    done = subprocess.run(
        [program, "-c", str(cubin(source, arch))], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, list[str]] = {}
    current: list[str] = []
    for line in done.stdout.splitlines():
        if section := re.match(r"\s*\.section\s+\.text\.(\S+?),", line):
            current = found.setdefault(readable(section[1]), [])
        elif code := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", line):
            current.append(code[1])
    return found


if __name__ == "__main__":
    for kernel, found in usage(Path(sys.argv[1]), sys.argv[2]).items():
        print(kernel, found)
