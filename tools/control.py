"""Make the stored control of the embedded base: what continued pretraining gives in the same time.

    python tools/control.py --out runs/control

Trains the base on at several learning rates on the clips that post-training gets, evaluates on the
same held-out clips with the same seeds, sweeps the base's sampling temperature, and tests whether
the base has converged: the best rate's change of the judge's macro F1, over continuations that the
rate was not chosen with, must lie within +-1.5% with its whole 95% interval. Writes
rlir/embedded/doom-tiny/control.json, which reports show beside post-training. An interrupted run
goes on where it was (OUT/parts).
"""

import argparse
import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlir import console
from rlir.checkpoints import fingerprint, load_weights, read_json, save_model, write_json
from rlir.evaluation.bootstrap import bootstrap_change
from rlir.evaluation.evaluator import Evaluator
from rlir.evaluation.following import Tally, join, tally
from rlir.evaluation.summary import Scored, gains, summarise, value_of
from rlir.grpo.control import continue_pretraining
from rlir.models.load import EMBEDDED, load_models
from rlir.models.world_model import WorldModel
from rlir.post_train import open_sets
from rlir.presets import preset
from rlir.pretrain.world_model import visual_codes

KEYS = ("judge_f1_macro", "judge_reward", "reward_reward", "judge_camera_l1", "psnr")
KEYS += ("frechet_judge_idm", "motion")
EQUIVALENCE = 0.015


class Parts:
    """Results by name, each kept on disk as soon as it is there."""

    def __init__(self, directory: Path, base: str):
        self.directory, self.base = directory, base
        directory.mkdir(parents=True, exist_ok=True)

    def __call__(self, name: str, make: Callable[[], Any]) -> Any:
        path = self.directory / f"{name}.json"
        if path.exists():
            part = read_json(path)
            if part["base"] == self.base:
                return part["value"]
        value = make()
        write_json(path, {"base": self.base, "value": value})
        return value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for clips and parts")
    parser.add_argument("--preset", default="doom-tiny")
    parser.add_argument("--steps", type=int, help="optimizer steps of continued pretraining")
    parser.add_argument("--rates", type=float, nargs="+", help="learning rates")
    parser.add_argument("--temperatures", type=float, nargs="*", default=[0.5, 0.7, 0.85, 1.0])
    parser.add_argument("--seeds", type=int, default=16, help="sampling seeds of the equivalence")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    chosen, models = preset(arguments.preset), load_models(None, None, None)
    config = chosen.control
    if arguments.steps:
        config = dataclasses.replace(config, steps=arguments.steps)
    rates = arguments.rates or list(config.learning_rates)
    sets = open_sets(arguments.out / "data", chosen.post_training_data, models)
    name = fingerprint(models.tokenizer)
    codes = visual_codes(sets["prompts"], models.tokenizer, name, lambda done, total: None)
    test = Evaluator(models, sets["test"], chosen.evaluation.clips, chosen.evaluation)
    parts = Parts(arguments.out / "parts", fingerprint(models.world_model))

    def weights(rate: float) -> Path:
        return parts.directory / f"rate-{rate:g}-{config.steps}"

    def trained(rate: float, on_step: Callable[[int, WorldModel], None]) -> WorldModel:
        frames, clips, base = chosen.grpo.frames, sets["prompts"], models.world_model
        model = continue_pretraining(base, clips, codes, frames, config, rate, on_step)
        save_model(weights(rate), model, "world-model", model.config)
        return model

    samples = chosen.evaluation.samples
    scores: list[Scored] = []

    def base() -> list[Scored]:
        if not scores:
            scores.extend(test.score_samples(models.world_model))
        return scores

    def one_rate(rate: float) -> dict[str, Any]:
        curve: list[dict[str, float]] = []

        def note(step: int, model: WorldModel) -> None:
            if step % -(-config.steps // 3) == 0 and step < config.steps:
                summary = summarise(test.score_samples(model), draws=1)
                figure = value_of(summary, "judge_f1_macro")
                curve.append({"step": step, "judge_f1_macro": figure or 0.0})

        scored = test.score_samples(trained(rate, note))
        what = f"continued pretraining, {config.steps} steps of {config.batch} clips at {rate:g}"
        summary = summarise(scored, what=what)
        change = gains(base(), scored)["judge_f1_macro"]
        console.say(f"{what}: judge F1 {change['before']:.4f} -> {change['after']:.4f}")
        first = {"step": 0, "judge_f1_macro": change["before"]}
        last = {"step": config.steps, "judge_f1_macro": change["after"]}
        figures = {k: value_of(summary, k) for k in KEYS}
        return {
            "summary": summary,
            "tried": figures | {"gain": change, "curve": [first, *curve, last]},
        }

    found = {
        rate: parts(f"rate-{rate:g}-{config.steps}", lambda r=rate: one_rate(r)) for rate in rates
    }
    best = max(found, key=lambda r: value_of(found[r]["summary"], "judge_f1_macro") or 0.0)

    def one_temperature(temperature: float) -> dict[str, Any]:
        test.config = dataclasses.replace(chosen.evaluation, temperature=temperature)
        summary = summarise(test.score_samples(models.world_model), draws=200)
        test.config = chosen.evaluation
        figures = {"temperature": temperature} | {k: value_of(summary, k) for k in KEYS}
        console.say(console.figures(figures))
        return figures

    sweep = [
        parts(f"temperature-{t:g}", lambda t=t: one_temperature(t)) for t in arguments.temperatures
    ]

    control = copy.deepcopy(models.world_model)
    load_weights(weights(best), control)

    def one_seed(seed: int) -> dict[str, Any]:
        return {
            name: test.score(model, seed=seed).judge.recovered.tolist()
            for name, model in (("base", models.world_model), ("control", control))
        }

    def equivalence() -> dict[str, Any]:
        """The 95% interval of the change lies within the margin: stricter than two tests at 5%."""
        commanded = test.actions.numpy()
        tallies: dict[str, list[Tally]] = {"base": [], "control": []}
        # Not the seeds that the best rate was chosen with.
        for seed in range(samples, samples + arguments.seeds):
            part = f"equivalence-{best:g}-{config.steps}-{seed}"
            read = parts(part, lambda s=seed: one_seed(s))
            for name, of in tallies.items():
                of.append(tally(commanded, np.array(read[name]), test.space))
            ids = np.tile(np.arange(len(commanded)), len(tallies["base"]))
            change = bootstrap_change(join(tallies["base"]), join(tallies["control"]), ids=ids)[
                "f1_macro"
            ]
            console.say(f"{len(tallies['base'])} seeds: {change['relative']:+.4f} {change['ci95']}")
        low, high = change["ci95"]
        return {
            "rollouts": len(commanded) * arguments.seeds,
            "judge_f1_macro": change,
            "margin": EQUIVALENCE,
            "equivalent": bool(low > -EQUIVALENCE and high < EQUIVALENCE),
        }

    tested = equivalence() if arguments.seeds else None
    stored = {
        "base": fingerprint(models.world_model),
        "control": dataclasses.asdict(config),
        "summary": found[best]["summary"],
        "tried": {f"{rate:g}": of["tried"] for rate, of in found.items()},
        "equivalence": tested,
        "temperature_sweep": sweep,
    }
    write_json(EMBEDDED / "control.json", stored)


if __name__ == "__main__":
    main()
