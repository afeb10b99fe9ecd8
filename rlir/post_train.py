"""Post-training end to end: record, evaluate, GRPO with inverse rewards, evaluate, report."""

import copy
import json
import resource
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import tyro

from rlir import console
from rlir.checkpoints import fingerprint, read_json, save_model
from rlir.data.clips import Clips, require_disjoint
from rlir.errors import InputError
from rlir.evaluation.evaluator import EvaluationConfig, Evaluator
from rlir.evaluation.summary import gains, summarise, value_of
from rlir.evaluation.verdict import verdict
from rlir.grpo.config import GrpoConfig
from rlir.grpo.control import ControlConfig, continue_pretraining
from rlir.grpo.reward import InverseReward
from rlir.grpo.trainer import GrpoTrainer, Metrics
from rlir.models.load import EMBEDDED, Models, load_models
from rlir.presets import Recording
from rlir.pretrain.stages import open_set, progress, record_set
from rlir.pretrain.world_model import visual_codes
from rlir.report.document import build, curves, section
from rlir.report.tables import text_table
from rlir.report.write import panels, write_run
from rlir.training import STATE, prepare_output


@dataclass(frozen=True)
class PostTraining:
    """Post-train a world model with inverse rewards, and show what it gained.

    Records prompts and test clips (or takes those of --data), evaluates the base, runs GRPO,
    evaluates again, and leaves in OUT: report.json, report.html, mp4s, TensorBoard events, and
    checkpoint/ with the post-trained model. --resume goes on after an interruption, to the same
    bits as an uninterrupted run.
    """

    preset: tyro.conf.Positional[Literal["doom-tiny", "doom", "doom-smoke"]]
    """doom-tiny (the demo, minutes), doom (up to an hour) or doom-smoke (seconds, for tests)."""
    out: Path
    """Folder of the run."""
    grpo: GrpoConfig = field(default_factory=GrpoConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    continued: ControlConfig = field(default_factory=ControlConfig)
    base: Path | None = None
    """Folder with tokenizer/ and world-model/; the embedded model by default."""
    idm: Path | None = None
    """Inverse dynamics model that gives the reward; the embedded one by default."""
    judge: Path | None = None
    """Inverse dynamics model that judges and takes no part in training; embedded by default."""
    data: Path | None = None
    """Folder with the recorded sets prompts, test and test-unseen; OUT/data by default."""
    control: Literal["stored", "live", "none"] = "stored"
    """Continued pretraining for comparison: the embedded base's stored figures, or run it now."""
    resume: bool = False
    """Go on with the run that OUT holds."""
    threads: int = 2
    """Threads of torch; the same number gives the same bits."""


class Clock:
    """Seconds by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        spent = time.perf_counter() - begin
        self.seconds[stage] = round(self.seconds.get(stage, 0.0) + spent, 2)


def _identity(command: PostTraining) -> dict[str, Any]:
    """What makes a run itself: a resumed one must be given the same."""
    keep = {k: v for k, v in asdict(command).items() if k not in ("out", "resume")}
    plain: dict[str, Any] = json.loads(json.dumps(keep, default=str))
    return plain


def open_sets(
    data: Path, recordings: Mapping[str, Recording], models: Models, *, workers: int = 2
) -> dict[str, Clips]:
    """Record what is missing and decode. ``data`` may hold sets of the user's own."""
    config, space = models.tokenizer.config, models.world_model.config.space
    for name, recording in recordings.items():
        record_set(data / name, recording, workers)
    sets = {name: open_set(data / name, space, config.height, config.width) for name in recordings}
    require_disjoint(**sets)
    return sets


class Run:
    """One post-training run in a folder."""

    def __init__(self, command: PostTraining, recordings: Mapping[str, Recording]):
        self.command, self.out, self.clock = command, command.out, Clock()
        self.models = load_models(command.base, command.idm, command.judge)
        if command.grpo.frames > self.models.world_model.config.frames:
            raise InputError(
                f"grpo: frames must be at most the world model's "
                f"{self.models.world_model.config.frames}, got {command.grpo.frames}"
            )
        # Only now: a mistaken argument must not claim the folder.
        self.resumed = prepare_output(self.out, _identity(command), command.resume)
        self.policy = copy.deepcopy(self.models.world_model).requires_grad_(True)
        with self.clock("data"):
            sets = open_sets(command.data or self.out / "data", recordings, self.models)
            self.clips = sets["prompts"]
            name = fingerprint(self.models.tokenizer)
            self.codes = visual_codes(
                self.clips, self.models.tokenizer, name, progress("encoding prompts")
            )
        with self.clock("evaluation"):
            config = command.evaluation
            self.test = Evaluator(self.models, sets["test"], config.clips, config)
            self.unseen = None
            if config.unseen_clips:
                self.unseen = Evaluator(
                    self.models, sets["test-unseen"], config.unseen_clips, config
                )

    # -- stages --------------------------------------------------------------------------------

    def train(self) -> GrpoTrainer:
        from torch.utils.tensorboard import SummaryWriter

        command = self.command
        trainer = GrpoTrainer(
            command.grpo,
            self.policy,
            self.models.tokenizer,
            InverseReward(self.models.reward_idm, command.grpo),
            self.clips,
            self.codes,
        )
        if self.resumed and (self.out / STATE).exists():
            trainer.load(self.out / STATE)
            console.say(f"resuming after step {trainer.step}")
        with SummaryWriter(str(self.out / "tensorboard"), purge_step=trainer.step + 1) as events:

            def on_step(metrics: Metrics) -> Metrics | None:
                every = command.evaluation.during_every
                extra = None
                if every and trainer.step % every == 0:
                    with self.clock("evaluation"):
                        extra = self._small_evaluation()
                for name, value in {**metrics, **(extra or {})}.items():
                    events.add_scalar(name, value, trainer.step)
                return extra

            trainer.run(self.out, on_step)
        return trainer

    def _small_evaluation(self) -> Metrics:
        """Fixed prompts and seeds: what moves in this curve is the policy, not the draw."""
        count = min(self.command.evaluation.during_clips, len(self.test.codes))
        scored = self.test.score(self.policy, count)
        summary = summarise(scored, draws=1)
        keys = ("reward_reward", "judge_reward", "judge_f1_macro", "motion", "psnr", "brightness")
        found = {f"eval_{key}": value_of(summary, key) for key in keys}
        figures = {key: value for key, value in found.items() if value is not None}
        console.say(f"evaluated: {console.figures(figures)}")
        return figures

    def stored(self, name: str) -> Any:
        """A part of the figures stored with the embedded base; None for another base."""
        path = EMBEDDED / "control.json"
        if self.command.base is not None or not path.exists():
            return None
        stored = read_json(path)
        ours = (fingerprint(self.models.world_model), len(self.test.codes))
        alike = ours == (stored["base"], stored["summary"]["clips"])
        return stored.get(name) if alike else None

    def control(self) -> dict[str, Any] | None:
        """Figures of continued pretraining: stored with the embedded base, or run now."""
        command = self.command
        if command.control == "none":
            return None
        if command.control == "stored":
            summary: dict[str, Any] | None = self.stored("summary")
            if summary is None:
                console.say("control: no stored figures for this base; --control live runs it")
            return summary
        runs = {}
        for rate in command.continued.learning_rates:
            model = continue_pretraining(
                self.models.world_model,
                self.clips,
                self.codes,
                command.grpo.frames,
                command.continued,
                rate,
            )
            what = f"continued pretraining, {command.continued.steps} steps at {rate:g}"
            draws = command.evaluation.draws
            runs[rate] = summarise(self.test.score_samples(model), draws=draws, what=what)
        best = max(runs, key=lambda rate: value_of(runs[rate], "judge_f1_macro") or 0.0)
        tried = {f"{rate:g}": value_of(of, "judge_f1_macro") for rate, of in runs.items()}
        return {**runs[best], "tried": tried}

    def save_checkpoint(self) -> Path:
        to = self.out / "checkpoint"
        info = {
            "tokenizer": fingerprint(self.models.tokenizer),
            "base": fingerprint(self.models.world_model),
            "grpo": asdict(self.command.grpo),
        }
        save_model(to / "world-model", self.policy, "world-model", self.policy.config, info=info)
        save_model(
            to / "tokenizer", self.models.tokenizer, "tokenizer", self.models.tokenizer.config
        )
        return to


def post_train(command: PostTraining, recordings: Mapping[str, Recording]) -> dict[str, Any]:
    """Run it. Returns the report, which is also on disk."""
    begin = time.perf_counter()
    run = Run(command, recordings)
    clock, draws = run.clock, command.evaluation.draws
    with clock("evaluation"):
        console.say(f"evaluating the base on {len(run.test.codes)} clips")
        base = run.test.score_samples(run.models.world_model)
        base_unseen = run.unseen.score_samples(run.models.world_model) if run.unseen else None
    trainer = run.train()
    run.save_checkpoint()
    with clock("evaluation"):
        console.say("evaluating the post-trained model")
        post = run.test.score_samples(run.policy)
        post_unseen = run.unseen.score_samples(run.policy) if run.unseen else None
    with clock("control"):
        control = run.control()
    what = command.evaluation
    with clock("figures"):
        gain = gains(base, post, control, draws=draws)
        ceiling = summarise(run.test.ceiling(), draws=draws, what="real frames")
        tokenised = run.test.tokenised()
        unseen = None
        if base_unseen and post_unseen:
            changed = gains(base_unseen, post_unseen, draws=draws)
            unseen = section(
                base=summarise(base_unseen, draws=draws, what="before, maps never seen"),
                post=summarise(post_unseen, draws=draws, what="after, maps never seen"),
                gain=changed,
                verdict=verdict(changed),
            )
        generated = command.grpo.prompts * command.grpo.group_size * (command.grpo.frames - 1)
        rolled_out = max(trainer.seconds["rollout"], 1e-9)
        report = build(
            preset=command.preset,
            paradigm="autoregressive",
            seed=command.grpo.seed,
            steps=trainer.step,
            base=summarise(base, draws=draws, what=f"before, temperature {what.temperature:g}"),
            post=summarise(post, draws=draws, what=f"after {trainer.step} steps"),
            gain=gain,
            verdict=verdict(gain, ceiling),
            control=control,
            floor=summarise(
                [run.test.floor(of) for of in base], draws=draws, what="base, actions shuffled"
            ),
            tokenised=summarise(tokenised, draws=draws, what="real frames, tokenised"),
            ceiling=ceiling,
            unseen_maps=unseen,
            curves=curves(trainer.curves),
            temperature_sweep=run.stored("temperature_sweep"),
            frames_per_second={"rollout": round(generated * trainer.step / rolled_out, 2)},
            command=f"rlir post-train {command.preset} --out {command.out}",
        )
    spent = {**clock.seconds, "training": round(sum(trainer.seconds.values()), 2)}
    spent |= {f"training.{name}": round(value, 2) for name, value in trainer.seconds.items()}
    report["seconds"] = {**spent, "total": round(time.perf_counter() - begin, 2)}
    report["settings"] = _identity(command)
    report["peak_memory_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    shown = panels(base[0], post[0], run.test.real, run.test.read_real["judge"][0])
    write_run(run.out, report, shown)
    console.out(text_table(report))
    for sentence in report["verdict"]:
        console.out(sentence)
    console.out(f"report: {run.out / 'report.html'}")
    return report
