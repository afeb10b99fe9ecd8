"""Spans reach torch.profiler and NVTX, and cost next to nothing while nothing records."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from rlir import ops, tracing
from rlir.actions import DOOM
from rlir.ops import group_advantage

PROGRAM = """
import torch
from rlir.ops import decode_actions, flow_sde_step, group_advantage, inverse_reward
from rlir.tracing import span
from rlir.actions import DOOM

with span("phase", 7):
    group_advantage(torch.zeros(3, 4))
    with span("bare"):
        pass
try:
    with span("failing", 1):
        group_advantage(torch.zeros(1, 2, 3))
except ValueError:
    pass
keys, camera = torch.zeros(2, 3, 8), torch.zeros(2, 3, 11)
actions = decode_actions(keys, camera, DOOM)
inverse_reward(keys, camera, actions.classes, DOOM)
flow_sde_step(camera, camera, 0.7, 0.6, noise_level=0.7)
"""
INT64 = 2  # NVTX_PAYLOAD_TYPE_INT64


@pytest.fixture(scope="session")
def recorder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = next((c for c in ("cc", "gcc", "clang") if shutil.which(c)), None)
    if compiler is None:
        pytest.skip("no C compiler")
    out = tmp_path_factory.mktemp("nvtx") / "recorder.so"
    source = Path(__file__).with_name("nvtx_recorder.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", out, source], check=True)
    return out


def test_ranges_reach_an_nvtx_tool(recorder: Path, tmp_path: Path) -> None:
    pytest.importorskip("nvtx")
    log = tmp_path / "log"
    env = {**os.environ, "NVTX_INJECTION64_PATH": str(recorder), "RLIR_NVTX_LOG": str(log)}
    subprocess.run([sys.executable, "-c", PROGRAM], env=env, check=True)
    lines = [x.split() for x in log.read_text().splitlines()]
    assert all(x[1] == tracing.DOMAIN for x in lines), "all in the domain"
    depth, events = 0, []
    for line in lines:
        if line[0] == "push":
            payload = int(line[4]) if int(line[3]) == INT64 else None
            events.append((depth, line[2], payload))
            depth += 1
        else:
            depth -= 1
            assert depth >= 0
    assert depth == 0, "every range ends, also where an error passes through"
    assert events == [
        (0, "phase", 7),
        (1, "group_advantage", 12),
        (1, "bare", None),
        (0, "failing", 1),
        (1, "group_advantage", 6),
        (0, "decode_actions", 48),
        (0, "inverse_reward", 48),
        (0, "flow_sde_step", 66),
    ]


def test_ranges_reach_torch_profiler() -> None:
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        with tracing.span("phase", 3):
            group_advantage(torch.zeros(2, 3))
        keys, camera = torch.zeros(2, 3, 8), torch.zeros(2, 3, 11)
        ops.decode_actions(keys, camera, space=DOOM)
    names = {event.key for event in recorded.key_averages()}
    assert {"rlir.phase", "rlir.group_advantage", "rlir.decode_actions"} <= names
    assert "rlir::group_advantage" in names, "the operator inside the range"


def test_every_public_op_is_a_span() -> None:
    names = [name.removesuffix("_reference") for name in ops.__all__ if "_reference" in name]
    assert len(names) > 5
    for name in names:
        public = name if name in ops.__all__ else f"{name}_"  # what writes in place ends in _
        function = getattr(ops, public)
        assert function.__wrapped__.__name__ == public, f"{public} must be @traced"


def test_a_span_does_nothing_while_nothing_records(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("a range was made")

    monkeypatch.setattr(tracing, "_domain", None)
    monkeypatch.setattr(tracing, "record_function", never)
    assert tracing.span("a", 1) is tracing.span("b"), "one shared object"
    with tracing.span("a"):
        group_advantage(torch.zeros(2, 3))
    with profile(activities=[ProfilerActivity.CPU]), pytest.raises(AssertionError):
        tracing.span("a")


def test_a_span_lets_errors_through_and_compiles() -> None:
    with pytest.raises(KeyError), tracing.span("a", 1):
        raise KeyError

    def step(x: torch.Tensor) -> torch.Tensor:
        with tracing.span("inside", 1):
            return group_advantage(x * 2)

    x = torch.randn(3, 4)
    assert torch.compile(step, backend="aot_eager", fullgraph=True)(x).equal(step(x))
