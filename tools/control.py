"""Make the stored control of the embedded base: what continued pretraining gives in the same time.

    python tools/control.py --out runs/control --steps 200

Trains the base on at several learning rates on the clips that post-training gets, evaluates on
the same held-out clips with the same seeds, and sweeps the base's sampling temperature. Writes
rlir/embedded/doom-tiny/control.json, which reports show beside post-training.
"""

import argparse
import dataclasses
from pathlib import Path

import torch

from rlir import console
from rlir.checkpoints import fingerprint, write_json
from rlir.evaluation.evaluator import Evaluator
from rlir.evaluation.summary import gains, summarise, value_of
from rlir.grpo.control import continue_pretraining
from rlir.models.load import EMBEDDED, load_models
from rlir.post_train import open_sets
from rlir.presets import preset
from rlir.pretrain.world_model import visual_codes

KEYS = ("judge_f1_macro", "judge_reward", "reward_reward", "judge_camera_l1", "psnr")
KEYS += ("frechet_judge_idm", "motion")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the recorded clips")
    parser.add_argument("--preset", default="doom-tiny")
    parser.add_argument("--steps", type=int, help="optimizer steps of continued pretraining")
    parser.add_argument("--rates", type=float, nargs="+", help="learning rates")
    parser.add_argument("--temperatures", type=float, nargs="*", default=[0.7, 0.85, 1.0])
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    chosen, models = preset(arguments.preset), load_models(None, None, None)
    config = chosen.control
    if arguments.steps:
        config = dataclasses.replace(config, steps=arguments.steps)
    sets = open_sets(arguments.out / "data", chosen.post_training_data, models)
    name = fingerprint(models.tokenizer)
    codes = visual_codes(sets["prompts"], models.tokenizer, name, lambda done, total: None)
    test = Evaluator(models, sets["test"], chosen.evaluation.clips, chosen.evaluation)
    base = test.score(models.world_model)
    summaries, tried = {}, {}
    for rate in arguments.rates or config.learning_rates:
        model = continue_pretraining(
            models.world_model, sets["prompts"], codes, chosen.grpo.frames, config, rate
        )
        scored = test.score(model)
        what = f"continued pretraining, {config.steps} steps of {config.batch} clips at {rate:g}"
        summaries[rate] = summarise(scored, what=what)
        change = gains(base, scored)["judge_f1_macro"]
        tried[f"{rate:g}"] = {k: value_of(summaries[rate], k) for k in KEYS} | {"gain": change}
        console.say(f"{what}: judge F1 {change['before']:.4f} -> {change['after']:.4f}")
    best = max(summaries, key=lambda rate: value_of(summaries[rate], "judge_f1_macro") or 0.0)
    sweep = []
    for temperature in arguments.temperatures:
        test.config = dataclasses.replace(chosen.evaluation, temperature=temperature)
        summary = summarise(test.score(models.world_model), draws=200)
        sweep.append({"temperature": temperature} | {k: value_of(summary, k) for k in KEYS})
        console.say(console.figures(sweep[-1]))
    stored = {
        "base": fingerprint(models.world_model),
        "control": dataclasses.asdict(config),
        "summary": summaries[best],
        "tried": tried,
        "temperature_sweep": sweep,
    }
    write_json(EMBEDDED / "control.json", stored)


if __name__ == "__main__":
    main()
