"""The stages that make a base from nothing: record, tokenizer, IDMs, world model.

Each stage is a command of its own, goes on after an interruption, and is skipped when its
checkpoint is there.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch

from rlir import console
from rlir.actions.space import action_space
from rlir.checkpoints import CONFIG, fingerprint, save_model
from rlir.data.clips import Clips, Progress, open_clips, require_disjoint
from rlir.data.doom import episode_names, record
from rlir.models.load import load_tokenizer
from rlir.presets import Preset, Recording
from rlir.pretrain.idm import InverseDynamicsTask, InverseDynamicsTraining, reconstructions
from rlir.pretrain.tokenizer import TokenizerTask, TokenizerTraining
from rlir.pretrain.world_model import WorldModelTask, WorldModelTraining, visual_codes
from rlir.training import Task, fit, prepare_output


def progress(name: str) -> Progress:
    """Prints a line at each tenth: these stages are short."""
    last = -1

    def update(done: int, total: int) -> None:
        nonlocal last
        if done * 10 // total != last:
            last = done * 10 // total
            console.say(f"{name}: {done} of {total}")

    return update


def record_set(directory: Path, recording: Recording, workers: int = 2) -> None:
    """Record one set of episodes, or what is missing of it; other recordings stay by themselves."""
    ours = episode_names(recording.episodes, recording.seed, recording.maps)
    if others := sorted({path.stem for path in directory.glob("*.jsonl")} - set(ours)):
        console.say(f"{directory} holds recordings such as {others[0]}: nothing is added to them")
        return
    update = progress(f"recording {directory.name}")
    record(
        directory,
        recording.episodes,
        recording.seed,
        recording.maps,
        recording.frames,
        workers,
        update,
    )


def open_set(directory: Path, space: str, height: int, width: int) -> Clips:
    """Decode one set, with progress."""
    update = progress(f"decoding {directory.name}")
    return open_clips(directory, action_space(space), height, width, update)


class Stage:
    """A folder claimed for one training run: trains a task in it and writes its checkpoint."""

    def __init__(self, kind: str, config: Any, out: Path, resume: bool, **info: str):
        self.kind, self.config, self.out, self.info = kind, config, out, info
        self.resumed = prepare_output(out, {"kind": kind, **info, **_plain(config)}, resume)

    def train(self, task: Task, **info: str) -> None:
        history = fit(task, self.config.fit, self.out, resumed=self.resumed)
        described = {**self.info, **info, "fit": asdict(self.config.fit), "history": history[-3:]}
        save_model(self.out, task.model, self.kind, self.config.model, info=described)
        console.say(f"{self.kind}: {console.figures(history[-1])}")


def _plain(config: Any) -> dict[str, Any]:
    """A config as JSON gives it back."""
    plain: dict[str, Any] = json.loads(json.dumps(asdict(config)))
    return plain


def pretrain_tokenizer(config: TokenizerTraining, data: Path, out: Path, resume: bool) -> None:
    """Train the tokenizer on DATA/train."""
    stage = Stage("tokenizer", config, out, resume, data="train")
    size = (config.model.height, config.model.width)
    train, validation = (open_set(data / name, "doom", *size) for name in ("train", "validation"))
    require_disjoint(train=train, validation=validation)
    stage.train(TokenizerTask(config, train, validation))


def pretrain_idm(
    config: InverseDynamicsTraining,
    role: Literal["reward", "judge"],
    data: Path,
    tokenizer_directory: Path,
    out: Path,
    resume: bool,
) -> None:
    """Train an inverse dynamics model; the judge on DATA/judge, which nothing else sees."""
    name = "train" if role == "reward" else "judge"
    stage = Stage("idm", config, out, resume, role=role, data=name)
    tokenizer = load_tokenizer(tokenizer_directory)
    size = (config.model.height, config.model.width)
    sets = {
        n: open_set(data / n, config.model.space, *size) for n in ("train", "judge", "validation")
    }
    require_disjoint(**sets)
    print_of = fingerprint(tokenizer)
    pairs = [
        (sets[n], reconstructions(sets[n], tokenizer, print_of, progress(f"tokenising {n}")))
        for n in (name, "validation")
    ]
    stage.train(InverseDynamicsTask(config, *pairs))


def pretrain_world_model(
    config: WorldModelTraining, data: Path, tokenizer_directory: Path, out: Path, resume: bool
) -> None:
    """Train the world model on DATA/train."""
    stage = Stage("world-model", config, out, resume, data="train")
    tokenizer = load_tokenizer(tokenizer_directory)
    size = (tokenizer.config.height, tokenizer.config.width)
    sets = {n: open_set(data / n, config.model.space, *size) for n in ("train", "validation")}
    require_disjoint(**sets)
    print_of = fingerprint(tokenizer)
    pairs = {
        name: (clips, visual_codes(clips, tokenizer, print_of, progress(f"encoding {name}")))
        for name, clips in sets.items()
    }
    task = WorldModelTask(config, pairs["train"], pairs["validation"], tokenizer.latents())
    stage.train(task, tokenizer=print_of)


def pretrain_all(preset: Preset, out: Path, workers: int = 2) -> None:
    """Every stage in order, from nothing; stages whose checkpoint is there are skipped."""
    data = out / "data"
    for name, recording in preset.pretraining_data.items():
        record_set(data / name, recording, workers)
    stages = {
        "tokenizer": lambda to: pretrain_tokenizer(preset.tokenizer, data, to, True),
        "reward-idm": lambda to: pretrain_idm(
            preset.reward_idm, "reward", data, out / "tokenizer", to, True
        ),
        "judge-idm": lambda to: pretrain_idm(
            preset.judge_idm, "judge", data, out / "tokenizer", to, True
        ),
        "world-model": lambda to: pretrain_world_model(
            preset.world_model, data, out / "tokenizer", to, True
        ),
    }
    for name, stage in stages.items():
        if (out / name / CONFIG).exists():
            console.say(f"{name}: is there")
            continue
        console.say(f"{name}: training on {torch.get_num_threads()} threads")
        stage(out / name)
