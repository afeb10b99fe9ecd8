"""What every benchmark does alike: interleaved timing, medians, the machine, a table and JSON.

The machine may be shared, so candidates take turns in one process and are compared by medians;
limits (what a copy of memory reaches) are measured in the same run.
"""

import ctypes
import gc
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from rlir import _build_info


def machine() -> dict[str, Any]:
    """Processor, load and versions, for the record."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    model = next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), "")
    return {
        "processor": model or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "isa": _build_info.used_cpu_isa(),
        "load": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
        "rlir": _build_info.version,
    }


def interleave(
    candidates: Mapping[str, Callable[[], object]],
    rounds: int = 31,
    seconds: float = 0.003,
    warmup: int = 10,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Median seconds a call of each candidate. They take turns, ``seconds`` at a time.

    A turn of calls shorter than 20 ms begins with 5 ms of them that are not counted: after another
    candidate, and most of all after a pause, a processor's wide units and a virtual machine's cores
    take milliseconds to come back, which whoever happens to be next would pay for. ``clock`` may be
    time.process_time where the machine is busy and there is one thread.
    """
    calls, warm = {}, {}
    for name, call in candidates.items():
        for _ in range(warmup):
            call()
        begin = clock()
        for _ in range(warmup):
            call()
        took = max(clock() - begin, 1e-9) / warmup
        calls[name] = max(1, int(seconds / took))
        warm[name] = math.ceil(0.005 / took) if took < 0.02 else 0
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, call in candidates.items():
            for _ in range(warm[name]):
                call()
            begin = clock()
            for _ in range(calls[name]):
                call()
            times[name].append((clock() - begin) / calls[name])
    return {name: statistics.median(values) for name, values in times.items()}


def peak_memory(call: Callable[[], object]) -> int:
    """Bytes by which the process grows at its highest while ``call`` runs (Linux)."""

    def status(key: str) -> int:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(int(x.split()[1]) * 1024 for x in lines if x.startswith(key))

    call()  # what stays allocated from the first call on is not counted
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # nor can the call live off what others have freed
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # resets the high-water mark
    before = status("VmRSS")
    call()
    return max(0, status("VmHWM") - before)


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns for people: the first to the left, the others to the right."""
    cells = [[str(x) for x in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        others = (c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))
        return "  ".join([row[0].ljust(widths[0]), *others])

    return "\n".join([line(cells[0]), line(["-" * w for w in widths]), *map(line, cells[1:])])


def emit(name: str, record: Mapping[str, Any]) -> None:
    """One line of JSON for programs, last."""
    print(json.dumps({"benchmark": name, **record}))
