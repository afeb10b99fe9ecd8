"""The whole method on real VizDoom, by the commands a user types, and what can go wrong."""

import json
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from testkit import command, environment, one_line, rlir

from rlir import _library
from rlir.checkpoints import CONFIG, WEIGHTS, load_state
from rlir.cli import AGAIN
from rlir.report.document import MODELS
from rlir.training import STATE

KEYS = {
    "preset",
    "paradigm",
    "seed",
    "steps",
    "gain",
    "seconds",
    "frames_per_second",
    "environment",
}
# What differs between two runs of the same settings: times, the machine's state, the folder.
OF_THE_RUN = {"seconds", "frames_per_second", "environment", "peak_memory_bytes", "command"}
STEPS = 5

pytestmark = pytest.mark.slow


def post_train(base: Path, out: Path, *more: object) -> list[object]:
    """The words of the command, with live control and every model given."""
    words: list[object] = ["post-train", "doom-smoke", "--out", out, "--threads", 1]
    words += ["--base", base, "--idm", base / "reward-idm", "--judge", base / "judge-idm"]
    words += ["--control", "live", "--grpo.steps", STEPS]
    return [*words, *more]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def models_of(base: Path) -> dict[str, bytes]:
    names = ("tokenizer", "world-model", "reward-idm", "judge-idm")
    return {name: (base / name / WEIGHTS).read_bytes() for name in names}


@pytest.fixture(scope="module")
def finished(smoke_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run from beginning to end."""
    before = models_of(smoke_base)
    out = tmp_path_factory.mktemp("finished") / "run"
    done = rlir(*post_train(smoke_base, out))
    assert done.returncode == 0, done.stderr
    assert str(out / "report.html") in done.stdout
    assert models_of(smoke_base) == before, "the base is read and not written"
    return out


def report_of(out: Path) -> dict:
    return json.loads((out / "report.json").read_text())


def test_pretraining_leaves_four_models_and_is_not_done_twice(smoke_base: Path) -> None:
    before = models_of(smoke_base)
    words = ("pretrain", "all", "--preset", "doom-smoke", "--out", smoke_base, "--threads", 1)
    again = rlir(*words)
    assert again.returncode == 0, again.stderr
    for name in before:
        assert f"{name}: is there" in again.stderr
        assert json.loads((smoke_base / name / CONFIG).read_text())["info"]["history"]
    assert models_of(smoke_base) == before


def test_the_report_says_everything(finished: Path) -> None:
    report = report_of(finished)
    assert {*KEYS, *MODELS} <= report.keys()
    assert (report["preset"], report["paradigm"]) == ("doom-smoke", "autoregressive")
    assert (report["seed"], report["steps"]) == (0, STEPS)
    for name in MODELS:
        assert report[name]["clips"] == 12, name
        assert 0 <= report[name]["judge_idm"]["f1_macro"] <= 1
        assert 0 <= report[name]["reward_idm"]["reward"] <= 1
    gain = report["gain"]["judge_f1_macro"]
    assert gain["before"] == pytest.approx(report["base"]["judge_idm"]["f1_macro"])
    assert gain["after"] == pytest.approx(report["post"]["judge_idm"]["f1_macro"])
    assert [step for step, _ in report["curves"]["reward"]] == list(range(1, STEPS + 1))
    assert [step for step, _ in report["curves"]["eval_judge_reward"]] == [2, 4]
    assert report["unseen_maps"]["gain"].keys() == report["gain"].keys()
    assert report["verdict"]
    assert report["seconds"]["total"] >= report["seconds"]["training"] > 0
    assert report["frames_per_second"]["rollout"] > 0
    assert report["environment"]["threads"] == 1


def test_the_run_leaves_a_page_clips_events_and_a_checkpoint(finished: Path) -> None:
    names = contents(finished)
    assert b"<html" in names["report.html"]
    assert len(list(finished.rglob("clip*.mp4"))) >= 3
    assert any(name.startswith("tensorboard/events") for name in names)
    for part in ("world-model", "tokenizer"):
        assert {f"checkpoint/{part}/{file}" for file in (WEIGHTS, CONFIG)} <= names.keys()
    assert not [name for name in names if "partial" in name]


def test_the_checkpoint_can_be_evaluated(finished: Path, smoke_base: Path, tmp_path: Path) -> None:
    judges = ["--idm", smoke_base / "reward-idm", "--judge", smoke_base / "judge-idm"]
    out = tmp_path / "figures.json"
    words = ["evaluate", finished / "checkpoint", *judges, "--data", finished / "data"]
    done = rlir(*words, "--preset", "doom-smoke", "--out", out, "--threads", 1)
    assert done.returncode == 0, done.stderr
    table = done.stdout.splitlines()
    assert table[0].split() == ["model", "ceiling", "floor", "unseen", "maps"]
    assert any(line.startswith("F1, macro, judge") for line in table)
    figures, report = json.loads(out.read_text()), report_of(finished)
    # The same clips, seeds and models as in the run: the same figures.
    assert figures["model"]["judge_idm"] == report["post"]["judge_idm"]
    assert figures["ceiling"]["quality"] == report["ceiling"]["quality"]


def interrupted_at(words: list[object], state: Path) -> None:
    """Start a run and kill it (no handler runs) as soon as it has saved a state."""
    child = subprocess.Popen(command(*words), env=environment(), stderr=subprocess.PIPE, text=True)
    while not state.exists():
        assert child.poll() is None, child.stderr.read()
        time.sleep(0.01)
    child.kill()
    child.communicate()
    assert child.returncode == -signal.SIGKILL, "it was done before it could be killed"


def test_a_run_that_is_killed_and_meets_a_full_disk_ends_in_the_same_bits(
    finished: Path, smoke_base: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    words = post_train(smoke_base, out)
    interrupted_at(words, out / STATE)
    good = (out / STATE).read_bytes()
    step = load_state(out / STATE)["step"]
    assert 1 <= step < STEPS
    assert not (out / "checkpoint").exists()

    def no_room_for_a_state() -> None:
        limit = len(good) - 1
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    full = rlir(*words, "--resume", preexec_fn=no_room_for_a_state)
    assert full.returncode == 1
    last = full.stderr.splitlines()[-1]
    assert last.startswith("rlir post-train: File too large")
    assert last.endswith(AGAIN)
    assert "Traceback" not in full.stderr
    assert (out / STATE).read_bytes() == good, "the last state is whole"
    assert not [name for name in contents(out) if "partial" in name]

    done = rlir(*words, "--resume")
    assert done.returncode == 0, done.stderr
    assert f"resuming after step {step}" in done.stderr
    ours, theirs = contents(out / "checkpoint"), contents(finished / "checkpoint")
    assert ours == theirs
    first, second = (
        {k: v for k, v in report_of(o).items() if k not in OF_THE_RUN} for o in (out, finished)
    )
    assert first == second, "the same seed gives the same figures"


def test_the_folder_of_another_run_is_not_written_to(finished: Path, smoke_base: Path) -> None:
    before = contents(finished)
    again = rlir(*post_train(smoke_base, finished))
    assert again.returncode == 2
    assert "must be empty or come with --resume" in one_line(again.stderr)
    other = rlir(*post_train(smoke_base, finished, "--resume", "--grpo.seed", 1))
    assert other.returncode == 2
    assert "must be of the same settings, got other grpo" in one_line(other.stderr)
    assert contents(finished) == before


def test_a_finished_run_is_reported_again_without_training(
    finished: Path, smoke_base: Path
) -> None:
    before = contents(finished / "checkpoint")
    done = rlir(*post_train(smoke_base, finished, "--resume"))
    assert done.returncode == 0, done.stderr
    assert f"resuming after step {STEPS}" in done.stderr
    assert contents(finished / "checkpoint") == before


def test_a_broken_recording_is_named_and_the_others_are_kept(
    finished: Path, smoke_base: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    shutil.copytree(finished / "data", data, ignore=shutil.ignore_patterns("cache-*"))
    video = min((data / "prompts").glob("*.mp4"))
    video.write_bytes(video.read_bytes()[:1000])
    done = rlir(*post_train(smoke_base, tmp_path / "run", "--data", data))
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert last.startswith("rlir post-train: data: ")
    assert video.name in last
    assert "Traceback" not in done.stderr


KILLED = """
import os, signal, sys
from rlir.cli import main
from rlir.rollout.engine import RolloutEngine

state, real, frames = sys.argv.pop(1), RolloutEngine._frame, [0]

def frame(self, *arguments):
    real(self, *arguments)
    frames[0] += os.path.exists(state)
    if frames[0] == 2:  # of the first rollout after a state was saved; more are to come
        os.kill(os.getpid(), signal.SIGKILL)

RolloutEngine._frame = frame
main()
"""


@pytest.mark.skipif(_library.PATH is None, reason="of the native engine")
def test_a_run_that_is_killed_in_a_rollout_ends_in_the_same_bits(
    finished: Path, smoke_base: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    words = [str(x) for x in post_train(smoke_base, out)]
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(out / STATE), *words],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert 1 <= load_state(out / STATE)["step"] < STEPS
    done = rlir(*words, "--resume")
    assert done.returncode == 0, done.stderr
    assert contents(out / "checkpoint") == contents(finished / "checkpoint")
