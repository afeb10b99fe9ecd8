"""The command line says what it takes, and turns what goes wrong into one line and an exit code."""

import re
from pathlib import Path

import pytest
from testkit import one_line, rlir

from rlir import __version__
from rlir.cli import COMMANDS, USAGE, run
from rlir.presets import PRESETS

STAGES = ("tokenizer", "idm", "world-model", "all")
HELP = {
    ("record", "doom"): ("--out", "--episodes", "--seed", "--map", "--frames", "--workers"),
    ("pretrain", "tokenizer"): ("--out", "--data", "--preset", "--resume", "--model.levels"),
    ("pretrain", "idm"): ("--role", "--tokenizer", "--model.architecture", "--fit.seed"),
    ("pretrain", "world-model"): ("--tokenizer", "--model.layers", "--fit.learning-rate"),
    ("pretrain", "all"): ("--out", "--preset", "--threads"),
    ("post-train",): ("--out", "--base", "--idm", "--judge", "--resume", "--grpo.group-size"),
    ("evaluate",): ("--data", "--idm", "--judge", "--out", "--evaluation.clips"),
}


def called(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """Run in this process: exit code, stdout, stderr."""
    capsys.readouterr()
    try:
        code = run(words)
    except SystemExit as end:
        code = int(end.code or 0)
    said = capsys.readouterr()
    return code, said.out, said.err


def test_usage_names_every_command_and_exit_code() -> None:
    for name in COMMANDS:
        assert f"\n  {name} " in USAGE
    for code in ("0 done", "1 failed", "2 bad input", "130 interrupted"):
        assert code in USAGE


@pytest.mark.parametrize("words", [["-h"], ["--help"], ["help"]])
def test_help_is_the_usage(capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    assert called(capsys, *words) == (0, USAGE + "\n", "")


def test_no_command_is_an_error_and_shows_the_usage(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = called(capsys)
    assert code == 2
    assert USAGE in out + err


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert called(capsys, "--version") == (0, f"rlir {__version__}\n", "")


def test_an_unknown_command_is_named_with_those_there_are(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, out, err = called(capsys, "posttrain")
    assert (code, out) == (2, "")
    assert "got 'posttrain'" in one_line(err)
    assert all(name in err for name in COMMANDS)


@pytest.mark.parametrize("words", HELP, ids=" ".join)
def test_help_of_a_command_names_its_options(
    capsys: pytest.CaptureFixture[str], words: tuple[str, ...]
) -> None:
    code, out, err = called(capsys, *words, "--help")
    assert (code, err) == (0, "")
    assert out.startswith(f"usage: rlir {' '.join(words[:2])}".removesuffix(" doom"))
    for option in HELP[words]:
        assert re.search(rf"{option}\b", out), option


def test_help_of_pretrain_names_every_stage(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = called(capsys, "pretrain", "--help")
    assert code == 0
    for stage in STAGES:
        assert f"\n  {stage} " in out


def test_defaults_are_those_of_the_preset(capsys: pytest.CaptureFixture[str]) -> None:
    assert len({of.grpo.steps for of in PRESETS.values()}) == len(PRESETS)
    for name, of in PRESETS.items():
        out = called(capsys, "post-train", name, "--help")[1]
        assert re.search(rf"--grpo\.steps INT[^-]*default:[\s│]*{of.grpo.steps}\)", out)


WRONG = {
    "no stage": ("pretrain nope", "the stage must be tokenizer, idm, world-model or all"),
    "no preset": ("pretrain tokenizer --preset nope --out x", "preset must be one of"),
    "an option missing": ("pretrain tokenizer --preset doom-smoke --out x", "--data"),
    "no such option": ("post-train doom-smoke --out x --grpo.nope 1", "--grpo.nope"),
    "a word for a number": ("post-train doom-smoke --out x --threads many", "--threads"),
    "no threads": ("post-train doom-smoke --out x --threads 0", "threads: must be at least 1"),
    "no such preset": ("post-train nope --out x", "nope"),
    "a group of one": (
        "post-train doom-smoke --out x --grpo.group-size 1",
        "group_size must be at least 2",
    ),
    "no steps": ("post-train doom-smoke --out x --grpo.steps 0", "steps must be at least 1"),
    "no clips": ("evaluate x --evaluation.clips 0", "clips must be at least 1"),
    "a negative temperature": (
        "evaluate x --evaluation.temperature -1",
        "temperature must be at least 0",
    ),
    "no rates": (
        "post-train doom-smoke --out x --continued.learning-rates",
        "learning_rates must be one or more",
    ),
    "no steps of training": (
        "pretrain tokenizer --preset doom-smoke --out x --data y --fit.steps 0",
        "steps must be at least 1",
    ),
    "channels": (
        "pretrain tokenizer --preset doom-smoke --out x --data y --model.channels 12",
        "channels must be a multiple of 8",
    ),
    "heads": (
        "pretrain world-model --preset doom-smoke --out x --data y --tokenizer z --model.heads 3",
        "hidden",
    ),
    "an architecture": (
        "pretrain idm --preset doom-smoke --out x --data y --tokenizer z --model.architecture no",
        "architecture",
    ),
    "a role": (
        "pretrain idm --preset doom-smoke --out x --data y --tokenizer z --role referee",
        "referee",
    ),
    "no episodes": ("record doom --out x --episodes 0 --seed 1", "episodes and workers must be"),
    "a negative seed": ("record doom --out x --episodes 1 --seed -1", "seed >= 0"),
    "no maps": ("record doom --out x --episodes 1 --seed 1 --map", "maps"),
    "another game": ("record quake --out x --episodes 1 --seed 1", "quake"),
    "no data": ("pretrain tokenizer --preset doom-smoke --out x --data y", "y/train"),
    "no checkpoint": ("evaluate x --idm y --judge z", "x/tokenizer must hold config.json"),
    "no base": ("post-train doom-smoke --out x --base y --idm y --judge y", "y/tokenizer must"),
    "words for the doctor": ("doctor heal", "Unrecognized options: heal"),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_input_is_one_line_and_two(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    case: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    words, expected = WRONG[case]
    code, out, err = called(capsys, *words.split())
    assert (code, out) == (2, "")
    line = one_line(err)
    name = words.split()[0]
    assert line.startswith(f"rlir {name}: ")
    assert not line.startswith(f"rlir {name}: {name}: "), "the command is named once"
    assert expected in line


@pytest.mark.parametrize("case", ["no base", "a group of one", "no threads", "no such option"])
def test_a_mistaken_argument_does_not_claim_the_output_folder(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert called(capsys, *WRONG[case][0].split())[0] == 2
    assert not list(tmp_path.iterdir())


def test_the_preset_is_the_positional_word_wherever_it_stands(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder may have a preset's name."""
    from rlir import commands

    seen = {}
    monkeypatch.setattr(
        commands, "post_train", lambda command, sets: seen.update(c=command, s=sets)
    )
    monkeypatch.setattr(commands, "_threads", lambda count: None)
    assert called(capsys, "post-train", "--out", "doom", "doom-smoke")[0] == 0
    assert (seen["c"].preset, str(seen["c"].out), seen["c"].grpo.steps) == ("doom-smoke", "doom", 3)
    assert seen["s"]["prompts"].episodes == 2


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = rlir("record", "doom", "--out", tmp_path / "file" / "x", "--episodes", 1, "--seed", 1)
    assert done.returncode in (1, 2)
    assert str(tmp_path / "file") in one_line(done.stderr)


def test_the_installed_command_ends_with_the_exit_code(tmp_path: Path) -> None:
    assert rlir("--version").stdout == f"rlir {__version__}\n"
    done = rlir("post-train", "doom-smoke", "--out", tmp_path / "x", "--grpo.group-size", 1)
    assert done.returncode == 2
    assert one_line(done.stderr).startswith("rlir post-train: ")
