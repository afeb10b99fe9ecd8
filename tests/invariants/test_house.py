"""The house rules that a program can hold a source tree to (CONTRIBUTING.md)."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OPS = sorted(p.stem for p in (ROOT / "rlir" / "ops").glob("[a-z]*.py"))
LAYERS = (
    "csrc/cpu/{op}.h",
    "csrc/cpu/{op}.cpp",
    "csrc/ops/{op}.cpp",
    "rlir/ops/{op}.py",
    "tests/ops/test_{op}.py",
    "benchmarks/bench_{op}.py",
    "docs/kernels/{op}.md",
)
CUDA_LAYERS = ("csrc/cuda/{op}.cuh", "csrc/cuda/{op}.cu", "csrc/ops/{op}_cuda.cpp")
CUDA_OPS = re.findall(
    r"\w+",
    re.search(r"RLIR_CUDA_OPS ([^)]*)", (ROOT / "csrc/cuda/ops.cmake").read_text())[1],
)
KERNELS_OF = {"group_attention": "video_attention"}
"""Ops that run another's CPU kernels."""
SUFFIXES = {".py", ".pyi", ".h", ".cpp", ".cuh", ".cu"}
FOLDERS = ("rlir", "csrc", "tests", "benchmarks", "examples", "scripts", "tools")
SOURCES = sorted(
    path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in SUFFIXES
)
TEXTS = [
    *SOURCES,
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted(ROOT.glob("*.md")),
    *(ROOT / name for name in ("Makefile", "CMakeLists.txt", "pyproject.toml", "constraints.txt")),
    *(ROOT / name for name in (".ci/run", ".pre-commit-config.yaml", ".gitignore")),
]
MAX_LINES = 400
# Home and work folders, and package indexes: what only holds on the machine it was written on.
# In pieces, so that this file does not hold them itself.
MACHINE = re.compile("|".join(["/ho" + r"me/\w", "/ro" + "ot/", "/wo" + "rk/", "/Us" + r"ers/\w"]))
INDEX = re.compile(r"(index-url|find-links)[ =]+(https?|file):", re.IGNORECASE)


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def opening(text: str) -> str:
    """The comment or docstring a file begins with."""
    lines = text.splitlines()
    if lines and lines[0].startswith('"""'):
        return ast.get_docstring(ast.parse(text)) or ""
    head = []
    for line in lines:
        if not line.startswith(("//", "#")):
            break
        head.append(line.lstrip("/# "))
    return " ".join(head)


def test_there_are_ops() -> None:
    assert "group_advantage" in OPS


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("op", OPS)
def test_an_op_has_its_name_in_every_layer(op: str, layer: str) -> None:
    name = KERNELS_OF.get(op, op) if layer.startswith("csrc/cpu") else op
    assert (ROOT / layer.format(op=name)).is_file()


@pytest.mark.parametrize("layer", CUDA_LAYERS)
@pytest.mark.parametrize("op", CUDA_OPS)
def test_a_cuda_op_has_its_name_in_every_layer(op: str, layer: str) -> None:
    assert op in OPS
    assert (ROOT / layer.format(op=op)).is_file()


@pytest.mark.parametrize("op", OPS)
def test_an_op_and_its_reference_are_public(op: str) -> None:
    public = (ROOT / "rlir" / "ops" / "__init__.py").read_text()
    assert f'"{op}"' in public or f'"{op}_"' in public, "a name that ends in _ writes in place"
    assert f'"{op}_reference"' in public
    assert op in (ROOT / "CMakeLists.txt").read_text()


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_a_source_file_is_short_or_argues_for_its_length(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    count = len(text.splitlines())
    if count > MAX_LINES:
        argued = re.search(r"\b(long|longer|one file|lines)\b", opening(text))
        assert argued, f"{count} lines: the opening comment must say why, limit {MAX_LINES}"


@pytest.mark.parametrize("path", TEXTS, ids=relative)
def test_no_paths_of_a_machine(path: Path) -> None:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        assert not MACHINE.search(line), f"line {number}: {line}"
        assert not INDEX.search(line), f"line {number}: {line}"


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_a_source_file_opens_with_what_it_is_for(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    if text.strip() and path.suffix != ".cpp":  # a .cpp may leave it to its header
        assert opening(text).strip()
