"""``rlir evaluate``: figures of one checkpoint on held-out clips."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlir import console
from rlir.checkpoints import write_json
from rlir.evaluation.evaluator import EvaluationConfig, Evaluator
from rlir.evaluation.summary import summarise, value_of
from rlir.models.load import load_models
from rlir.presets import Recording

ROWS = (
    ("judge_f1_macro", "F1, macro, judge"),
    ("judge_precision_macro", "precision, macro, judge"),
    ("judge_recall_macro", "recall, macro, judge"),
    ("judge_f1_micro", "F1, micro, judge"),
    ("judge_camera_l1", "camera error, degrees, judge"),
    ("reward_f1_macro", "F1, macro, reward IDM"),
    ("reward_reward", "reward"),
    ("psnr", "PSNR, dB"),
    ("ssim", "SSIM"),
    ("frechet_judge_idm", "Frechet distance, judge"),
    ("motion", "motion, of real"),
)


def evaluate(
    base: Path | None,
    idm: Path | None,
    judge: Path | None,
    data: Path,
    recordings: Mapping[str, Recording],
    config: EvaluationConfig,
    out: Path | None,
) -> dict[str, Any]:
    """Evaluate and print a table; with the ceiling (real frames) and the floor beside."""
    from rlir.post_train import open_sets

    models = load_models(base, idm, judge)
    sets = open_sets(data, {k: v for k, v in recordings.items() if k != "prompts"}, models)
    test = Evaluator(models, sets["test"], config.clips, config)
    console.say(f"rolling out {len(test.codes)} clips")
    scored = test.score_samples(models.world_model)
    result: dict[str, Any] = {
        "model": summarise(scored, draws=config.draws),
        "ceiling": summarise(test.ceiling(), draws=config.draws),
        "floor": summarise([test.floor(of) for of in scored], draws=config.draws),
    }
    if config.unseen_clips:
        unseen = Evaluator(models, sets["test-unseen"], config.unseen_clips, config)
        result["unseen maps"] = summarise(
            unseen.score_samples(models.world_model), draws=config.draws
        )
    console.out(f"{'':30}" + "".join(f"{name:>14}" for name in result))
    for key, label in ROWS:
        cells = (value_of(summary, key) for summary in result.values())
        row = "".join(f"{'' if cell is None else format(cell, '14.3f'):>14}" for cell in cells)
        console.out(f"{label:30}{row}")
    if out is not None:
        write_json(out, result)
    return result
