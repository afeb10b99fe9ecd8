"""Every example runs on a CPU in seconds, and what it trains gets better."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))


def test_there_is_an_example_for_each_integration() -> None:
    names = {path.stem.split("_")[0] for path in EXAMPLES}
    assert names == {"trl", "verl", "openrlhf", "torchrl"}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_an_example_runs(path: Path) -> None:
    if path.stem.startswith("trl") and importlib.util.find_spec("trl") is None:
        pytest.skip("TRL is not installed (the extra dev brings it)")
    done = subprocess.run(
        [sys.executable, str(path)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rewards = [float(x) for x in re.findall(r"reward ([\d.]+)", done.stdout)]
    if path.stem.startswith("trl"):
        assert len(re.findall(r"loss [+-][\d.]+", done.stdout)) == 6
    else:
        assert rewards[-1] > rewards[0] + 0.3, done.stdout
