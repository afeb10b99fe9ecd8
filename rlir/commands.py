"""What the commands take (frozen dataclasses that tyro reads) and the functions that they call."""

import ctypes
import io
from collections.abc import Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
import tyro

from rlir import console
from rlir.data.doom import TRAIN_MAPS, record
from rlir.errors import InputError
from rlir.evaluation.evaluator import EvaluationConfig
from rlir.post_train import PostTraining, post_train
from rlir.presets import PRESETS, Preset, preset
from rlir.pretrain import stages
from rlir.pretrain.idm import InverseDynamicsTraining
from rlir.pretrain.tokenizer import TokenizerTraining
from rlir.pretrain.world_model import WorldModelTraining

T = TypeVar("T")
PresetName = Literal["doom-tiny", "doom", "doom-smoke"]
REQUIRED: Any = tyro.MISSING


@dataclass(frozen=True)
class Record:
    """Play VizDoom with a scripted, persistent, human-like policy and write clips.

    Each episode is an H.264 mp4 beside a jsonl with a line a frame (keyboard.keys,
    mouse.dx/dy/buttons, map, episode, seed), the layout of VPT's contractor recordings.
    Episodes that already stand in OUT are kept.
    """

    game: tyro.conf.Positional[Literal["doom"]]
    """The game."""
    out: Path
    """Folder for the clips."""
    episodes: int
    """Episodes; the maps take turns."""
    seed: int
    """Episode i is seeded by (seed, i)."""
    map: tuple[str, ...] = TRAIN_MAPS
    """Maps, such as freedoom1:E1M6 freedoom2:MAP04."""
    frames: int = 300
    """Frames of an episode, at 7 a second."""
    workers: int = 2
    """Processes; the clips do not depend on it."""


@dataclass(frozen=True)
class PretrainTokenizer:
    """Train the image tokenizer (finite scalar quantisation) on DATA/train."""

    out: Path
    """Folder for the checkpoint and the training state."""
    data: Path
    """Folder with the recorded sets train, judge and validation."""
    training: Annotated[TokenizerTraining, tyro.conf.arg(name="")]
    preset: PresetName = "doom-tiny"
    """Where the defaults of all settings come from."""
    resume: bool = False
    """Go on with the run that OUT holds."""
    threads: int = 2
    """Threads of torch; the same number gives the same bits."""


@dataclass(frozen=True)
class PretrainWorldModel:
    """Train the autoregressive world model on the tokenised clips of DATA/train."""

    out: Path
    """Folder for the checkpoint and the training state."""
    data: Path
    """Folder with the recorded sets train, judge and validation."""
    tokenizer: Path
    """Checkpoint of the tokenizer that encodes the frames."""
    training: Annotated[WorldModelTraining, tyro.conf.arg(name="")]
    preset: PresetName = "doom-tiny"
    """Where the defaults of all settings come from."""
    resume: bool = False
    """Go on with the run that OUT holds."""
    threads: int = 2
    """Threads of torch; the same number gives the same bits."""


@dataclass(frozen=True)
class PretrainIdm:
    """Train an inverse dynamics model on real and on tokenised frames.

    The reward model learns from DATA/train, the judge (another architecture, another seed) from
    DATA/judge, which nothing else sees.
    """

    out: Path
    """Folder for the checkpoint and the training state."""
    data: Path
    """Folder with the recorded sets train, judge and validation."""
    tokenizer: Path
    """Checkpoint of the tokenizer whose frames it must read."""
    training: Annotated[InverseDynamicsTraining, tyro.conf.arg(name="")]
    role: Literal["reward", "judge"] = "reward"
    """What the model is for."""
    preset: PresetName = "doom-tiny"
    """Where the defaults of all settings come from."""
    resume: bool = False
    """Go on with the run that OUT holds."""
    threads: int = 2
    """Threads of torch; the same number gives the same bits."""


@dataclass(frozen=True)
class PretrainAll:
    """Record the data and train all four models; what OUT already holds is skipped or resumed."""

    out: Path
    """Folder for the data and the checkpoints."""
    preset: PresetName = "doom-tiny"
    """Settings of everything."""
    threads: int = 2
    """Threads of torch; the same number gives the same bits."""


@dataclass(frozen=True)
class Evaluate:
    """Measure action following and video quality of a world model on held-out clips.

    CHECKPOINT holds world-model/ and tokenizer/, as `post-train` leaves in OUT/checkpoint and
    `pretrain all` in OUT; `embedded` is the model that comes with the package.
    """

    checkpoint: tyro.conf.Positional[Path]
    """Folder with world-model/ and tokenizer/, or `embedded`."""
    evaluation: EvaluationConfig
    idm: Path | None = None
    """Reward inverse dynamics model; the embedded one by default."""
    judge: Path | None = None
    """Judge; the embedded one by default."""
    data: Path = Path("runs/evaluation-data")
    """Folder with the sets test and test-unseen; they are recorded if they are not there."""
    out: Path | None = None
    """Write the figures as JSON to this file."""
    preset: PresetName = "doom-tiny"
    """Which clips are recorded and where the defaults come from."""
    threads: int = 2
    """Threads of torch; the same number gives the same bits."""


def parse(command: type[T], arguments: Sequence[str], prog: str, default: T | None = None) -> T:
    """Read a command line; --help is tyro's, and what tyro has to say of an error is one line."""
    options: dict[str, Any] = {} if default is None else {"default": default}
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            return tyro.cli(command, args=arguments, prog=prog, **options)
    except SystemExit as end:
        if end.code != 2:
            raise
        raise InputError(f"{_unboxed(said.getvalue())} ({prog} --help lists all)") from None


def _unboxed(box: str) -> str:
    """The first paragraph of a box that tyro draws around an error, as one line."""
    rows = [row.strip(" │╰╯") for row in box.splitlines()[1:]]  # without the title
    paragraphs = groupby((row for row in rows if row), key=lambda row: not row.strip("─-"))
    return next((" ".join(lines) for rule, lines in paragraphs if not rule), "bad arguments")


def _option(arguments: Sequence[str], name: str, default: str) -> str:
    """An option that chooses the defaults of the others, so it is read before them."""
    for i, word in enumerate(arguments):
        if word == name and i + 1 < len(arguments):
            return arguments[i + 1]
        if word.startswith(f"{name}="):
            return word.partition("=")[2]
    return default


def _chosen(arguments: Sequence[str]) -> tuple[Any, Preset]:
    name = _option(arguments, "--preset", "doom-tiny")
    return name, preset(name)


def _threads(count: int) -> None:
    if count < 1:
        raise InputError(f"threads: must be at least 1, got {count}")
    torch.set_num_threads(count)
    _keep_memory()


def _keep_memory() -> None:
    """Have the C library keep freed memory instead of returning it to the system.

    Every step allocates the same large tensors; mapped anew they fault in page by page, which was
    9% of a training step's processor time. Without glibc nothing happens.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    trim_threshold, mmap_threshold, most = -1, -3, 2**31 - 1
    mallopt(mmap_threshold, most)
    mallopt(trim_threshold, most)


def run_record(arguments: Sequence[str]) -> None:
    command = parse(Record, arguments, "rlir record")
    with console.progress("recording", command.episodes) as bar:
        frames = record(
            command.out,
            command.episodes,
            command.seed,
            command.map,
            command.frames,
            command.workers,
            lambda done, total: bar(done),
        )
    console.out(f"{frames} frames written to {command.out}")


PRETRAIN_USAGE = """\
usage: rlir pretrain tokenizer|idm|world-model|all [--preset NAME] --out DIR ...

  tokenizer    image tokenizer, on DATA/train
  idm          inverse dynamics model, --role reward (on DATA/train) or judge (on DATA/judge)
  world-model  autoregressive world model, on DATA/train
  all          record the data, then train all four, skipping what is there

rlir pretrain STAGE --help lists every setting. Held-out figures are taken on DATA/validation;
--resume goes on after an interruption."""


def run_pretrain(arguments: Sequence[str]) -> None:
    stage, rest = (arguments[0] if arguments else "--help"), arguments[1:]
    if stage in ("-h", "--help"):
        console.out(PRETRAIN_USAGE)
        return
    prog = f"rlir pretrain {stage}"
    name, chosen = _chosen(rest)
    if stage == "tokenizer":
        default = PretrainTokenizer(REQUIRED, REQUIRED, chosen.tokenizer, name)
        t = parse(PretrainTokenizer, rest, prog, default)
        _threads(t.threads)
        stages.pretrain_tokenizer(t.training, t.data, t.out, t.resume)
    elif stage == "world-model":
        wm = PretrainWorldModel(REQUIRED, REQUIRED, REQUIRED, chosen.world_model, name)
        w = parse(PretrainWorldModel, rest, prog, wm)
        _threads(w.threads)
        stages.pretrain_world_model(w.training, w.data, w.tokenizer, w.out, w.resume)
    elif stage == "idm":
        judge = _option(rest, "--role", "reward") == "judge"
        training = chosen.judge_idm if judge else chosen.reward_idm
        role: Literal["reward", "judge"] = "judge" if judge else "reward"
        idm = PretrainIdm(REQUIRED, REQUIRED, REQUIRED, training, role, name)
        i = parse(PretrainIdm, rest, prog, idm)
        _threads(i.threads)
        stages.pretrain_idm(i.training, i.role, i.data, i.tokenizer, i.out, i.resume)
    elif stage == "all":
        a = parse(PretrainAll, rest, prog)
        _threads(a.threads)
        stages.pretrain_all(preset(a.preset), a.out, a.threads)
    else:
        raise InputError(
            f"pretrain: the stage must be tokenizer, idm, world-model or all, got {stage!r}"
        )


def run_post_train(arguments: Sequence[str]) -> None:
    # The preset is the first word that names one and is no option's value.
    pairs = zip(["", *arguments], arguments, strict=False)
    named = (word for before, word in pairs if word in PRESETS and not before.startswith("--"))
    name = next(named, "doom-tiny")
    chosen = preset(name)
    literal: Any = name
    default = PostTraining(
        preset=literal if name in arguments else REQUIRED,
        out=REQUIRED,
        grpo=chosen.grpo,
        evaluation=chosen.evaluation,
        continued=chosen.control,
    )
    command = parse(PostTraining, arguments, "rlir post-train", default)
    _threads(command.threads)
    post_train(command, chosen.post_training_data)


def run_evaluate(arguments: Sequence[str]) -> None:
    from rlir.evaluation.command import evaluate

    name, chosen = _chosen(arguments)
    command = parse(
        Evaluate, arguments, "rlir evaluate", Evaluate(REQUIRED, chosen.evaluation, preset=name)
    )
    _threads(command.threads)
    base = None if str(command.checkpoint) == "embedded" else command.checkpoint
    evaluate(
        base,
        command.idm,
        command.judge,
        command.data,
        preset(command.preset).post_training_data,
        command.evaluation,
        command.out,
    )


@dataclass(frozen=True)
class Doctor:
    """What is installed, which backends work, and why others do not."""

    parity: Path | None = None
    """Instead: measure how far the trainer's log-probabilities of rollouts are from the engine's,
    for this checkpoint (a folder with world-model/, or that folder itself, or `embedded`)."""


def run_doctor(arguments: Sequence[str]) -> None:
    from rlir import doctor

    command = parse(Doctor, arguments, "rlir doctor", Doctor())
    raise SystemExit(doctor.run() if command.parity is None else doctor.run_parity(command.parity))
