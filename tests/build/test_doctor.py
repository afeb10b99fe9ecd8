"""The doctor: every line says what is there, or why not; it works where the library does not."""

import sys
from pathlib import Path

import pytest
import torch
from building import run_apart

from rlir import _library, doctor
from rlir.ops import _attention_backends, attention_backend


def test_report_covers_what_matters() -> None:
    rows = {row.name: row for row in doctor.report()}
    assert {"rlir", "python", "torch", "threads", "isa detected", "isa used"} <= rows.keys()
    assert {"reference", "cpu", "cuda device", "cuda kernels"} <= rows.keys()
    assert {"flash-attn", "xformers", "nvtx", "vizdoom", "libx264"} <= rows.keys()
    assert {"attention on cpu", "attention on cuda"} <= rows.keys()
    assert rows["reference"].works
    assert rows["isa used"].value.split()[0] in _library.CPU_ISAS
    for row in rows.values():
        assert row.value
        assert len(row.value.splitlines()) == 1
        if not row.works:  # and says why
            assert ": " in row.value


def test_prints_sections_and_a_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    code = doctor.run()
    lines = capsys.readouterr().out.splitlines()
    for section in ("versions", "processor", "backends", "games and video"):
        assert section in lines
    assert lines[-1].startswith("not working: " if code else "ready")


def test_a_broken_optional_package_is_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nvtx.py").write_text("raise OSError('libnvToolsExt.so: cannot open\\nmore')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "nvtx", raising=False)
    monkeypatch.setattr(doctor, "_version", lambda package: "1.0")
    rows = {row.name: row for row in doctor.report()}
    assert rows["nvtx"].value == "no: 1.0 does not import: libnvToolsExt.so: cannot open"
    assert not rows["nvtx"].works


def test_libraries_say_what_they_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    serves = "video_attention's plain causal masks in bfloat16 on CUDA"
    problem = "must be 2.3 or later, got 2.0.1"
    monkeypatch.setattr(
        doctor, "_package", lambda where, name, *_: doctor.Row(where, name, "yes: 1")
    )
    monkeypatch.setattr(
        _attention_backends, "problem_of", {"flash-attn": problem, "xformers": None}.get
    )
    rows = {row.name: row for row in doctor._optional("backends")}
    assert rows["xformers"].value == f"yes: 1; serves {serves}"
    assert rows["flash-attn"].value == f"no: flash-attn {problem}; would serve {serves}"
    assert not rows["flash-attn"].works


def test_says_what_computes_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    def on(device: str) -> str:
        rows = {row.name: row for row in doctor._attention("backends")}
        return rows[f"attention on {device}"].value

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert on("cuda") == "no: torch sees no GPU; 'auto' is chosen"
    expected = "rlir's kernels" if _library.PATH else "the plain PyTorch reference"
    assert on("cpu") == expected
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    how = "({!r} is chosen; rlir.ops.attention_backend)".format
    for built, installed, name, used in (
        (None, (), "auto", "the plain PyTorch reference"),
        (None, ("xformers",), "auto", "xformers"),
        (None, ("flash-attn", "xformers"), "auto", "flash-attn"),
        (Path(), ("flash-attn", "xformers"), "auto", "rlir's kernels"),
        (Path(), ("flash-attn", "xformers"), "xformers", "xformers"),
        (None, ("flash-attn", "xformers"), "rlir", "the plain PyTorch reference"),
    ):
        monkeypatch.setattr(_library, "CUDA", built)
        monkeypatch.setattr(
            _attention_backends, "libraries_on", lambda device, found=installed: found
        )
        monkeypatch.setattr(_attention_backends, "problem_of", lambda library: None)
        with attention_backend(name):
            assert on("cuda") == f"{used} {how(name)}"
    assert on("cpu") == expected


def test_works_without_the_native_library(unbuilt: Path) -> None:
    done = run_apart(unbuilt, "-m", "rlir.doctor")
    assert done.returncode == 1, done.stderr
    assert "no: rlir: the native library is not built; run: pip install" in done.stdout
    assert done.stdout.splitlines()[-1] == "not working: cpu"
    capped = run_apart(unbuilt, "-m", "rlir.doctor", RLIR_FORCE_REFERENCE="1")
    assert "no: RLIR_FORCE_REFERENCE is set, ops run their reference" in capped.stdout
