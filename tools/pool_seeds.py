"""The gain over several post-training seeds, pooled: what no single run's interval can say.

    python tools/pool_seeds.py runs/demo runs/seed1 runs/seed2

Evaluates the embedded base and each run's checkpoint on the held-out clips of the first run, with
the preset's seeds, and prints each run's change and the pooled one with paired 95% intervals: a
clip is drawn together with all its continuations. Fréchet distances are not pooled: they fall
with the number of distinct pictures, of which the runs have more than the one base.
"""

import argparse
from pathlib import Path

import torch

from rlir import console
from rlir.evaluation.evaluator import Evaluator
from rlir.evaluation.summary import Scored, gains
from rlir.models.load import load_models, load_world_model
from rlir.post_train import open_sets
from rlir.presets import preset

KEYS = ("judge_f1_macro", "judge_reward", "reward_f1_macro", "judge_camera_l1", "psnr", "ssim")
KEYS += ("motion", "brightness")
FRECHET = ("frechet_judge_idm", "frechet_reward_idm")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", help="folders of runs of one preset")
    parser.add_argument("--preset", default="doom-tiny")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    chosen, models = preset(arguments.preset), load_models(None, None, None)
    sets = open_sets(arguments.runs[0] / "data", chosen.post_training_data, models)
    test = Evaluator(models, sets["test"], chosen.evaluation.clips, chosen.evaluation)
    base = test.score_samples(models.world_model)
    posts: list[list[Scored]] = []
    for run in arguments.runs:
        posts.append(test.score_samples(load_world_model(run / "checkpoint" / "world-model")))
        show(str(run), base, posts[-1], KEYS + FRECHET)
    show("pooled", base * len(posts), [scored for post in posts for scored in post], KEYS)


def show(name: str, base: list[Scored], post: list[Scored], keys: tuple[str, ...]) -> None:
    changes = gains(base, post)
    for key in keys:
        change = changes[key]
        low, high = change["ci95"] or (float("nan"), float("nan"))
        console.out(
            f"{name:24}{key:22}{change['before']:9.4f} -> {change['after']:9.4f}"
            f"  {change['relative'] or 0:+.1%} ({low:+.1%} to {high:+.1%})"
        )


if __name__ == "__main__":
    main()
