"""What the tests of the build share: where things are, and Python apart from the source tree."""

import os
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Built:
    """A wheel, the folder it was built in and a folder it is installed in."""

    wheel: Path
    build: Path
    site: Path


def environment(**changes: str) -> dict[str, str]:
    """This process's environment with the virtual environment's tools first and no RLIR_ ones."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RLIR_")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{kept.get('PATH', '')}"
    return {**kept, "PATH": path, **changes}


def run_apart(site: Path, *arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
    """Run Python with the packages of ``site`` before those installed, outside the source tree.

    ``-S`` leaves out .pth files, and with them an editable install of rlir.
    """
    path = os.pathsep.join([str(site), sysconfig.get_path("platlib")])
    return subprocess.run(
        [sys.executable, "-S", *arguments],
        env=environment(PYTHONPATH=path, **changes),
        cwd=site,
        capture_output=True,
        text=True,
        check=False,
    )
