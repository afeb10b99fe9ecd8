"""Running a program of digests under every instruction set of this machine."""

import json
import os
import subprocess
import sys
from pathlib import Path

from rlir import _build_info, _library


def digests(program: str, isa: str, threads: int) -> dict[str, str]:
    """What the program beside this file prints, under an instruction set and some threads."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name(program)), str(threads)],
        env={**os.environ, "RLIR_CPU_ISA": isa},
        capture_output=True,
        check=True,
    )
    found = dict(json.loads(done.stdout))
    assert found.pop("isa") == isa
    return found


def assert_same_bits_everywhere(program: str, of_amx: str = "") -> None:
    """`of_amx` begins the names of digests whose bits the build for AMX has to itself."""
    best = _library.CPU_ISAS.index(_build_info.detected_cpu_isa())
    isas = [isa for isa in _build_info.cpu_isas if _library.CPU_ISAS.index(isa) <= best]
    first = digests(program, isas[0], 1)
    assert first
    for isa, threads in [*((isa, 1) for isa in isas[1:]), (isas[-1], 3)]:
        found = digests(program, isa, threads)
        if isa == "amx":
            assert_amx_has_the_bits(found, first, of_amx)
        else:
            assert found == first, f"{isa} with {threads} threads differs"


def assert_amx_has_the_bits(found: dict[str, str], first: dict[str, str], of_amx: str) -> None:
    assert found.keys() == first.keys()
    for name in first:
        own = of_amx != "" and name.startswith(of_amx)
        assert own or found[name] == first[name], f"{name} differs on amx"
