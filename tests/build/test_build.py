"""The build: what the binaries hold, a wheel that works elsewhere, errors in one clear line."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from building import ROOT, Built, environment, run_apart

CPU_SOURCES = sorted((ROOT / "csrc" / "cpu").iterdir())
# Headers of the C library and intrinsics: nothing of torch, and no C++ templates.
CUDA_SOURCES = sorted(p for p in (ROOT / "csrc" / "cuda").iterdir() if p.suffix != ".cmake")
FREE = {"stddef.h", "stdint.h", "string.h", "immintrin.h"}


# --- What the binaries hold ----------------------------------------------------------------------


@pytest.mark.parametrize("source", CPU_SOURCES, ids=lambda p: p.name)
def test_kernels_include_neither_torch_nor_templates(source: Path) -> None:
    found = re.findall(r'#\s*include\s*([<"])([^>"]+)', source.read_text())
    assert {name for mark, name in found if mark == "<"} <= FREE
    own = [name for mark, name in found if mark == '"']
    assert all(name.startswith(("core/", "cpu/")) for name in own)


@pytest.mark.parametrize("source", CUDA_SOURCES, ids=lambda p: p.name)
def test_cuda_kernels_do_not_include_torch(source: Path) -> None:
    found = re.findall(r'#\s*include\s*([<"])([^>"]+)', source.read_text())
    assert {name for mark, name in found if mark == "<"} <= {*FREE, "assert.h", "cuda_runtime.h"}
    own = [name for mark, name in found if mark == '"']
    assert all(name.startswith(("core/", "cpu/", "cuda/", "emu/")) for name in own)


@pytest.mark.skipif(shutil.which("nm") is None, reason="nm (binutils) is not installed")
def test_kernels_share_no_symbols_between_instruction_sets(built: Built) -> None:
    """The linker keeps one copy of a weak symbol: it could be AVX-512 code on a CPU without."""
    objects = sorted(built.build.glob("CMakeFiles/rlir_cpu_*.dir/csrc/cpu/*.o"))
    assert objects
    for path in objects:
        isa = re.search(r"rlir_cpu_(\w+)\.dir", str(path))
        assert isa is not None
        nm = ["nm", "--demangle", "--defined-only", "--extern-only", str(path)]
        listing = subprocess.run(nm, capture_output=True, text=True, check=True).stdout
        assert listing.strip()
        for line in listing.splitlines():
            _, kind, name = line.split(maxsplit=2)
            assert kind == "T", f"{path.name} for {isa[1]}: {line}"
            assert name.startswith(f"rlir::cpu::{isa[1]}::"), f"{path.name}: {line}"


PAIRS = ("avx512_bf16", "amx")
"""Builds whose products take pairs of bfloat16: what one has through tiles, the other has too."""


@pytest.mark.skipif(shutil.which("objdump") is None, reason="objdump (binutils) is not installed")
def test_only_the_build_for_amx_has_tiles(built: Built) -> None:
    objects = sorted(built.build.glob("CMakeFiles/rlir_cpu_*.dir/csrc/cpu/*.o"))
    assert objects
    names = {isa: {p.name for p in objects if f"rlir_cpu_{isa}.dir" in str(p)} for isa in PAIRS}
    assert names["amx"] == names["avx512_bf16"]
    for path in objects:
        objdump = ["objdump", "--disassemble", "--no-show-raw-insn", str(path)]
        listing = subprocess.run(objdump, capture_output=True, text=True, check=True).stdout
        found = set(re.findall(r"\t(tdpbf16ps|tile\w+|ldtilecfg)\b", listing))
        wanted = {"ldtilecfg", "tileloadd", "tilezero", "tdpbf16ps", "tilestored", "tilerelease"}
        assert found == (wanted if "rlir_cpu_amx.dir" in str(path) else set()), path


@pytest.mark.skipif(shutil.which("readelf") is None, reason="readelf (binutils) is not installed")
def test_libraries_hold_no_paths_of_this_machine(built: Built) -> None:
    libraries = sorted((built.site / "rlir").glob("*.so"))
    names = [p.name.split(".")[0] for p in libraries]
    assert [n for n in names if n != "librlir_cuda"] == ["_build_info", "librlir_ops"]
    for path in libraries:
        read = ["readelf", "--dynamic", str(path)]
        dynamic = subprocess.run(read, capture_output=True, text=True, check=True).stdout
        assert "RUNPATH" not in dynamic
        assert "RPATH" not in dynamic
        data = path.read_bytes()
        assert str(ROOT).encode() not in data
        assert sys.prefix.encode() not in data


# --- The wheel -----------------------------------------------------------------------------------


def test_wheel_holds_the_package_and_nothing_else(built: Built) -> None:
    with zipfile.ZipFile(built.wheel) as wheel:
        names = set(wheel.namelist())
    sources = {p for p in (ROOT / "rlir").rglob("*") if p.is_file() and p.suffix != ".so"}
    sources = {p for p in sources if "__pycache__" not in p.parts}
    assert {str(p.relative_to(ROOT)) for p in sources} <= names
    assert {"rlir/py.typed", "rlir/_build_info.pyi"} <= names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"rlir"}


def test_cuda_kernels_are_in_a_library_of_their_own(built: Built) -> None:
    """Built wherever nvcc is; it loads where torch has no CUDA at all, and says what it was for."""
    library = built.site / "rlir" / "librlir_cuda.so"
    cache = (built.build / "CMakeCache.txt").read_text()
    compiler = re.search(r"^CMAKE_CUDA_COMPILER:\w+=(.*)$", cache, re.MULTILINE)
    assert library.exists() == (compiler is not None and not compiler[1].endswith("NOTFOUND"))
    code = "from rlir import _build_info as b; print(*b.cuda_archs)"
    archs = run_apart(built.site, "-c", code).stdout.split()
    if not library.exists():
        assert archs == []
        pytest.skip("nvcc is not installed: no CUDA kernels were built")
    assert archs == ["80-real", "90-real", "100-real", "120-real", "100-virtual"]
    code = f"""
import torch, rlir.ops
torch.ops.load_library({str(library)!r})
print(torch._C._dispatch_has_kernel_for_dispatch_key("rlir::group_advantage", "CUDA"))
"""
    done = run_apart(built.site, "-c", code)
    assert done.stdout == "True\n", done.stderr
    if shutil.which("readelf") is not None:
        read = ["readelf", "--dynamic", str(library)]
        dynamic = subprocess.run(read, capture_output=True, text=True, check=True).stdout
        assert "cudart" not in dynamic


def test_cuda_can_be_left_out_in_one_line(tmp_path: Path) -> None:
    for options, why in (
        (["-DRLIR_CUDA=OFF"], "RLIR_CUDA is OFF"),
        (["-DCMAKE_CUDA_COMPILER=/nonexistent/nvcc"], "no nvcc that works was found"),
    ):
        lines = configured(tmp_path / why.split()[0], *options).stdout.splitlines()
        found = [line.removeprefix("-- ") for line in lines if "CUDA" in line and "rlir" in line]
        assert found == [f"rlir: CUDA was left out: {why}; CUDA tensors use PyTorch"]


def test_wheel_works_outside_the_source_tree(built: Built) -> None:
    code = """
import torch, rlir
from rlir import _build_info, _library
from rlir.ops import group_advantage
a = group_advantage(torch.tensor([[1.0, 3.0]]), eps=0.0, unbiased=False)
assert a.tolist() == [[-1.0, 1.0]], a
assert _build_info.used_cpu_isa() in _library.CPU_ISAS
assert _library.CPU_ISAS == _build_info.cpu_isa_names()
print(rlir.__file__, _library.PATH, sep="\\n")
"""
    done = run_apart(built.site, "-c", code)
    assert done.returncode == 0, done.stderr
    assert all(line.startswith(str(built.site)) for line in done.stdout.splitlines())


# --- Errors of loading ---------------------------------------------------------------------------


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode != 0
    return done.stderr.strip().splitlines()[-1]


def test_a_missing_library_says_what_to_do(unbuilt: Path) -> None:
    assert last_line(run_apart(unbuilt, "-c", "import rlir.ops")) == (
        "ImportError: rlir: the native library is not built; "
        "run: pip install --no-build-isolation -e . (in rlir's source)"
    )
    code = "import torch, rlir.ops; print(rlir.ops.group_advantage(torch.ones(1, 2)).tolist())"
    forced = run_apart(unbuilt, "-c", code, RLIR_FORCE_REFERENCE="1")
    assert forced.stdout == "[[0.0, 0.0]]\n", forced.stderr


def test_a_broken_library_says_what_to_do(built: Built, unbuilt: Path) -> None:
    (info,) = (built.site / "rlir").glob("_build_info*.so")
    shutil.copy(info, unbuilt / "rlir")
    text = last_line(run_apart(unbuilt, "-c", "import rlir.ops"))
    assert text.startswith("ImportError: rlir: librlir_ops.so is missing beside _build_info; run: ")
    (unbuilt / "rlir" / "librlir_ops.so").write_bytes(b"not a library")
    text = last_line(run_apart(unbuilt, "-c", "import rlir.ops"))
    assert text.startswith("ImportError: rlir: librlir_ops.so does not load in torch ")
    assert text.endswith(
        "rebuild it with: pip install --no-build-isolation -e . (in rlir's source)"
    )


def test_an_unknown_instruction_set_is_refused(built: Built) -> None:
    done = run_apart(built.site, "-c", "import rlir.ops", RLIR_CPU_ISA="sse9")
    assert last_line(done) == (
        "rlir.errors.InputError: "
        "RLIR_CPU_ISA must be one of baseline, avx2, avx512, avx512_bf16, amx, got 'sse9'"
    )


def test_another_op_library_can_be_loaded_in_place(built: Built, tmp_path: Path) -> None:
    code = "from rlir import _library; print(_library.PATH)"
    other = tmp_path / "librlir_other.so"
    done = run_apart(built.site, "-c", code, RLIR_OPS_LIBRARY=str(other))
    assert last_line(done) == (
        f"rlir.errors.InputError: RLIR_OPS_LIBRARY must be an op library, found no file {other}"
    )
    shutil.copy(built.site / "rlir" / "librlir_ops.so", other)
    done = run_apart(built.site, "-c", code, RLIR_OPS_LIBRARY=str(other))
    assert done.stdout.strip() == str(other)


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512", "avx512_bf16", "amx"])
def test_the_instruction_set_can_only_be_lowered(built: Built, isa: str) -> None:
    code = "from rlir import _build_info as b; print(b.detected_cpu_isa(), b.used_cpu_isa())"
    detected, used = run_apart(built.site, "-c", code, RLIR_CPU_ISA=isa).stdout.split()
    order = ["baseline", "avx2", "avx512", "avx512_bf16", "amx"]
    assert used == min(detected, isa, key=order.index)


# --- Errors of building --------------------------------------------------------------------------


def configured(tmp_path: Path, *options: str, **changes: str) -> subprocess.CompletedProcess[str]:
    """Configure with CMake."""
    cmake = shutil.which("cmake", path=environment()["PATH"])
    assert cmake is not None
    return subprocess.run(
        [
            cmake,
            *("-S", str(ROOT), "-B", str(tmp_path / "build"), "-G", "Ninja"),
            f"-DPython_EXECUTABLE={sys.executable}",
            *options,
        ],
        env=environment(**changes),
        capture_output=True,
        text=True,
        check=False,
    )


def configure(tmp_path: Path, *options: str, **changes: str) -> str:
    """Configure with CMake, which must fail; the one line that says why."""
    done = configured(tmp_path, *options, **changes)
    assert done.returncode != 0
    lines = [line.strip() for line in done.stderr.splitlines()]
    (line,) = [line for line in lines if line.startswith("rlir: ")]
    return line


def hiding(tmp_path: Path, package: str) -> str:
    """A PYTHONPATH under which ``package`` is not installed."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Hide:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.split('.')[0] == {package!r}:\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Hide())\n"
    )
    return str(tmp_path)


def test_a_missing_compiler_is_one_line(tmp_path: Path) -> None:
    assert configure(tmp_path, CXX="/nonexistent/c++") == (
        "rlir: a C++20 compiler is needed and none was found (CXX is '/nonexistent/c++'): "
        "install g++ 11 or clang 14, or later"
    )


def test_a_missing_torch_is_one_line(tmp_path: Path) -> None:
    line = configure(tmp_path, PYTHONPATH=hiding(tmp_path, "torch"))
    assert line == (
        f"rlir: torch 2.13 or later is needed and was not found in {sys.executable}: "
        "pip install 'torch>=2.13', then build with --no-build-isolation"
    )


def test_an_old_torch_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise AssertionError('not imported')\n")
    (tmp_path / "torch" / "version.py").write_text("__version__ = '2.9.1+cu128'\n")
    assert configure(tmp_path, PYTHONPATH=str(tmp_path)) == (
        "rlir: torch 2.13 or later is needed, got 2.9.1+cu128: "
        "pip install 'torch>=2.13', then build with --no-build-isolation"
    )


def test_a_missing_pybind11_is_one_line(tmp_path: Path) -> None:
    line = configure(tmp_path, PYTHONPATH=hiding(tmp_path, "pybind11"))
    assert line == (
        f"rlir: pybind11 3 is needed and was not found in {sys.executable}: "
        "pip install 'pybind11>=3'"
    )


def test_a_missing_ninja_is_one_line(tmp_path: Path) -> None:
    folders = os.pathsep.join(
        folder
        for folder in environment()["PATH"].split(os.pathsep)
        if (Path(folder) / "ninja").exists()
    ).replace(os.pathsep, ";")
    line = configure(tmp_path, f"-DCMAKE_IGNORE_PATH={folders};/usr/bin;/usr/local/bin;/bin")
    assert line == "rlir: ninja is needed and was not found: pip install ninja"


def make(tmp_path: Path, *variables: str, **changes: str) -> str:
    done = subprocess.run(
        ["make", "-C", str(ROOT), "lint", f"VENV={tmp_path / 'venv'}", *variables],
        env=environment(**changes),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert not (tmp_path / "venv").exists()
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("rlir: ")]
    return line


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_refuses_an_old_python_in_one_line(tmp_path: Path) -> None:
    old = tmp_path / "python3"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.9.2" || exit 1\n')
    old.chmod(0o755)
    assert make(tmp_path, f"PYTHON={old}") == (
        "rlir: Python 3.11 or later is needed, got Python 3.9.2: "
        "install it, or make PYTHON=python3.11"
    )


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_refuses_a_missing_compiler_in_one_line(tmp_path: Path) -> None:
    assert make(tmp_path, f"PYTHON={sys.executable}", CXX="/nonexistent/c++") == (
        "rlir: a C++20 compiler is needed and none was found (CXX is '/nonexistent/c++'): "
        "install g++ 11 or clang 14, or later"
    )
