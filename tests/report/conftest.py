"""A small evaluation: random clips of which the post-trained model obeys more often."""

import numpy as np
import pytest

from rlir.actions.space import DOOM
from rlir.evaluation.summary import Reading, Scored, gains, summarise
from rlir.evaluation.verdict import verdict
from rlir.report.clips import ClipPanel, View
from rlir.report.document import build, curves, section

CLIPS, ACTIONS = 24, 3


def scored(right, seed):
    truth, rng = np.random.default_rng(7), np.random.default_rng(seed)

    def classes(generator):
        return np.stack([generator.integers(0, s, (CLIPS, ACTIONS)) for s in DOOM.factor_sizes], -1)

    commanded = classes(truth)
    real = truth.integers(0, 256, (CLIPS, ACTIONS + 1, 16, 24, 3), np.uint8)
    features = truth.normal(size=(CLIPS, ACTIONS, 4))

    def reading():
        recovered = np.where(rng.random(commanded.shape) < right, commanded, classes(rng))
        return Reading(recovered, features + rng.normal(0, 0.3, features.shape), features)

    generated = np.clip(real + rng.normal(0, 9, real.shape), 0, 255).astype(np.uint8)
    maps = [f"MAP0{i % 2}" for i in range(CLIPS)]
    return Scored(DOOM, commanded, reading(), reading(), generated, real, maps)


@pytest.fixture(scope="session")
def runs():
    return {"base": scored(0.4, 1), "post": scored(0.9, 2), "ceiling": scored(0.95, 3)}


@pytest.fixture(scope="session")
def minimal(runs):
    """The least that a report can hold."""
    gain = gains(runs["base"], runs["post"], draws=50)
    return build(
        preset="doom",
        paradigm="autoregressive",
        seed=0,
        steps=2,
        base=summarise(runs["base"], draws=50),
        post=summarise(runs["post"], draws=50),
        gain=gain,
        verdict=verdict(gain),
    )


@pytest.fixture(scope="session")
def full(runs):
    """A report with every part."""
    names = {"control": "base", "floor": "base", "tokenised": "ceiling", "ceiling": "ceiling"}
    summaries = {k: summarise(v, what=f"the {k}", draws=50) for k, v in runs.items()}
    gain = gains(runs["base"], runs["post"], summaries["base"], draws=50)
    said = verdict(gain, summaries["ceiling"])
    parts = {"base": summaries["base"], "post": summaries["post"], "gain": gain, "verdict": said}
    rows = [{"step": s, "reward": 0.5 + s / 100, "kl": s / 50} for s in range(1, 31)]
    rows[9]["judge_reward"] = 0.6
    return build(
        preset="doom",
        paradigm="autoregressive",
        seed=0,
        steps=30,
        **parts,
        **{name: summaries[source] for name, source in names.items()},
        unseen_maps=section(**parts),
        curves=curves(rows),
        temperature_sweep=[{"temperature": 0.7, "base_judge_f1": 0.5, "post_judge_f1": None}],
        seconds={"rollout": 3.0, "update": 4.5},
        frames_per_second={"generation": 99.0},
        command="rlir post-train --preset doom <seed>",
    )


@pytest.fixture(scope="session")
def panels(runs):
    def panel(i):
        views = tuple(
            View(label, frames[i], runs[run].judge.recovered[i])
            for label, run, frames in (
                ("real", "ceiling", runs["ceiling"].real),
                ("base", "base", runs["base"].generated),
                ("post-trained", "post", runs["post"].generated),
            )
        )
        return ClipPanel(f"MAP0{i} <b>", DOOM, runs["base"].commanded[i], views)

    return [panel(0), panel(1)]
