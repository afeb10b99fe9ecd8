"""One wheel of this source tree, built once, and copies of the package for the tests here."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from building import ROOT, Built, environment


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The wheel of this source tree. Torch comes from this environment."""
    top = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(top)]
    subprocess.run(
        [*build, "-C", f"build-dir={top / 'build'}", str(ROOT)],
        env=environment(),
        check=True,
    )
    (wheel,) = top.glob("rlir-*.whl")
    install = [*pip, "install", "--no-deps", "--target", str(top / "site"), str(wheel)]
    subprocess.run(install, env=environment(), check=True)
    return Built(wheel, top / "build", top / "site")


@pytest.fixture
def unbuilt(tmp_path: Path) -> Path:
    """A folder with rlir's Python files and no native library."""
    ignored = shutil.ignore_patterns("__pycache__", "*.so")
    shutil.copytree(ROOT / "rlir", tmp_path / "rlir", ignore=ignored)
    return tmp_path
