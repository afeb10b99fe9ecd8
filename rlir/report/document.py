"""report.json: one plain dict that holds all a report says.

The keys, all always there (null where something was not run):

- ``preset``, ``paradigm``, ``seed``, ``steps``, ``command``: what was run, and how to run it again
- ``base``, ``post``, ``control``, ``floor``, ``tokenised``, ``ceiling``: `summary.summarise`'s dict
  of each model (or of real video), with its own ``what``
- ``gain``: `summary.gains` from base to post; ``verdict``: `verdict.verdict`'s sentences
- ``unseen_maps``: the same models, gain and verdict on maps that no training saw
- ``curves``: {name: [[step, value], ...]}
- ``temperature_sweep``: rows of flat figures, one a sampling temperature
- ``seconds`` a stage (``stage.part`` for a part of one); ``frames_per_second`` by name;
  ``environment``

A caller may add keys; ``peak_memory_bytes`` is shown if it is there.
"""

import datetime
import importlib.metadata
import math
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from rlir.checkpoints import read_json, write_json
from rlir.errors import InputError

MODELS = ("base", "post", "control", "floor", "tokenised", "ceiling")
_PACKAGES = ("rlir", "torch", "numpy", "scikit-image", "av", "vizdoom")


def build(
    *,
    preset: str,
    paradigm: str,
    seed: int,
    steps: int,
    base: Mapping[str, Any],
    post: Mapping[str, Any],
    gain: Mapping[str, Any],
    verdict: Sequence[str],
    control: Mapping[str, Any] | None = None,
    floor: Mapping[str, Any] | None = None,
    tokenised: Mapping[str, Any] | None = None,
    ceiling: Mapping[str, Any] | None = None,
    unseen_maps: Mapping[str, Any] | None = None,
    curves: Mapping[str, Sequence[Sequence[float]]] | None = None,
    temperature_sweep: Sequence[Mapping[str, float]] | None = None,
    seconds: Mapping[str, float] | None = None,
    frames_per_second: Mapping[str, float] | None = None,
    command: str = "",
) -> dict[str, Any]:
    """The report as a dict. Figures that are not finite become null, so that it is JSON.

    unseen_maps: of `section`.
    """
    report = {
        "preset": preset,
        "paradigm": paradigm,
        "seed": seed,
        "steps": steps,
        "command": command,
        **section(
            base=base,
            post=post,
            gain=gain,
            verdict=verdict,
            control=control,
            floor=floor,
            tokenised=tokenised,
            ceiling=ceiling,
        ),
        "unseen_maps": unseen_maps,
        "curves": curves or {},
        "temperature_sweep": temperature_sweep,
        "seconds": seconds or {},
        "frames_per_second": frames_per_second or {},
        "environment": environment(),
    }
    clean: dict[str, Any] = _plain(report)
    return clean


def section(
    *,
    base: Mapping[str, Any],
    post: Mapping[str, Any],
    gain: Mapping[str, Any],
    verdict: Sequence[str],
    **others: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """The part of a report that is about one set of clips: models by name, gain, verdict."""
    if unknown := sorted(set(others) - set(MODELS)):
        raise InputError(f"report: models must be of {MODELS}, got {unknown[0]!r}")
    models = {"base": base, "post": post, **others}
    return {name: models.get(name) for name in MODELS} | {"gain": gain, "verdict": list(verdict)}


def curves(metrics: Sequence[Mapping[str, float]]) -> dict[str, list[list[float]]]:
    """Rows of metrics with a ``step`` each, turned into a curve a metric.

    A metric need not be in every row (evaluations are rare).
    """
    out: dict[str, list[list[float]]] = {}
    for row in metrics:
        for name, value in row.items():
            if name != "step":
                out.setdefault(name, []).append([row["step"], value])
    return out


def environment() -> dict[str, Any]:
    """What a run depends on: versions, processor, threads, date. No names of people or machines."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(),
        "packages": versions,
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"


def _plain(value: Any) -> Any:
    """Dicts, lists, strings and numbers alone; not-a-number and infinity become None."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, str) or value is None or isinstance(value, bool):
        return value
    if hasattr(value, "tolist"):  # NumPy scalars and arrays, tensors
        return _plain(value.tolist())
    if isinstance(value, Sequence):
        return [_plain(v) for v in value]
    return value if math.isfinite(value) else None


def write_report(path: Path, report: Mapping[str, Any]) -> None:
    """Write report.json."""
    write_json(path, _plain(report))


def read_report(path: Path) -> dict[str, Any]:
    """Read report.json and check that it is one."""
    report = read_json(path)
    if not isinstance(report, dict):
        raise InputError(f"report: {path} must hold an object, got {type(report).__name__}")
    for name in ("preset", "base", "post", "gain", "verdict"):
        if report.get(name) is None:
            raise InputError(f"report: {path} must hold {name!r}, found none")
    return report
