"""Summaries and gains agree with their parts, and verdicts see reward hacking."""

import json

import numpy as np
import pytest

from rlir.actions.space import DOOM
from rlir.errors import InputError
from rlir.evaluation.following import following
from rlir.evaluation.quality import frechet_distance
from rlir.evaluation.summary import (
    Reading,
    Scored,
    gains,
    interval_of,
    summarise,
    value_of,
)
from rlir.evaluation.verdict import WARNING, figure, percent, verdict

CLIPS, ACTIONS, FEATURES = 48, 5, 6
NOT_SHOWN = "That the post-trained model follows its actions better is not shown"


def scored(
    reward=0.6, judge=0.6, *, motion=1.0, brightness=1.0, drift=0.0, noise=20, seed=0, clips=CLIPS
):
    """A model whose actions are read right this often, with pictures spoiled this much."""
    truth = np.random.default_rng(100)  # what the clips are: the same for every model
    rng = np.random.default_rng(seed)

    def classes(generator):
        shape = (clips, ACTIONS)
        return np.stack([generator.integers(0, s, shape) for s in DOOM.factor_sizes], -1)

    commanded = classes(truth)
    still = truth.integers(60, 200, (clips, 1, 16, 16, 3))
    moving = truth.integers(-50, 50, (clips, ACTIONS + 1, 16, 16, 3))
    real_features = truth.normal(size=(clips, ACTIONS, FEATURES))
    error = rng.integers(-noise, noise + 1, moving.shape)
    generated = (still + motion * moving + error) * brightness

    def reading(right):
        keep = rng.random(commanded.shape) < right
        features = real_features + rng.normal(drift, 0.5, real_features.shape)
        return Reading(np.where(keep, commanded, classes(rng)), features, real_features)

    return Scored(
        DOOM,
        commanded,
        reading(reward),
        reading(judge),
        np.clip(generated, 0, 255).astype(np.uint8),
        (still + moving).astype(np.uint8),
        [f"MAP0{i % 2}" for i in range(clips)],
    )


@pytest.fixture(scope="module")
def base():
    return scored()


def sentences(base, post, **control):
    return verdict(gains(base, post, draws=300, **control))


def warned(said, phrase):
    return any(s.startswith(WARNING) and phrase in s for s in said)


def test_summary_has_the_figures_of_its_parts(base):
    summary = summarise(base, what="a test", draws=50)
    assert summary["what"] == "a test"
    assert (summary["clips"], summary["actions_per_clip"]) == (CLIPS, ACTIONS)
    for idm in ("reward", "judge"):
        figures = following(base.tallies[idm])
        intervals = summary[f"{idm}_idm"].pop("ci95")
        assert summary[f"{idm}_idm"] == figures
        low, high = intervals["f1_macro"]
        assert low < figures["f1_macro"] < high
    features = base.judge.features.reshape(-1, FEATURES)
    real = base.judge.real_features.reshape(-1, FEATURES)
    assert summary["quality"]["frechet_judge_idm"] == frechet_distance(features, real)
    assert set(summary["quality"]) == {
        "psnr", "ssim", "motion", "brightness", "frechet_reward_idm", "frechet_judge_idm", "ci95",
    }  # fmt: skip
    assert sum(m["clips"] for m in summary["maps"].values()) == CLIPS
    half = summarise(base.select(np.array(base.maps) == "MAP00"), draws=50)
    assert half["judge_idm"]["f1_macro"] == summary["maps"]["MAP00"]["judge_f1_macro"]


def test_summary_and_gains_are_json(base):
    few = base.select(np.arange(3))  # too few clips for the jackknife's groups
    for value in (summarise(few, draws=10), gains(few, few, summarise(few, draws=10), draws=10)):
        assert json.loads(json.dumps(value, allow_nan=False)) == value
    assert gains(few, few, draws=10)["frechet_judge_idm"]["ci95"] is None


def test_every_gain_is_found_in_a_summary(base):
    post = scored(0.8, 0.75, seed=1)
    summary, control = summarise(post, draws=50), summarise(base, draws=50)
    gain = gains(base, post, control, draws=50)
    for name in ("reward_f1_macro", "judge_reward", "judge_camera_l1", "judge_f1/yaw", "psnr"):
        assert name in gain
    for name, change in gain.items():
        assert change["after"] == pytest.approx(value_of(summary, name))
        assert change["over_control"] == pytest.approx(change["relative"])  # control is the base
        assert (interval_of(summary, name) is None) == (change["ci95_absolute"] is None)
    assert all(c["over_control"] is None for c in gains(base, post, draws=10).values())


def test_gains_need_the_same_clips(base):
    with pytest.raises(InputError, match="the same clips in the same order"):
        gains(base, base.select(np.arange(CLIPS)[::-1]))


def test_seeds_are_pooled_by_clip(base):
    posts = [scored(0.8, 0.75, seed=s) for s in (1, 2, 3)]
    one = gains(base, posts[0], draws=300)["judge_reward"]
    pooled = gains([base] * 3, posts, draws=300)["judge_reward"]
    mean = np.mean([following(p.tallies["judge"])["reward"] for p in posts])
    assert pooled["after"] == pytest.approx(mean)
    assert pooled["before"] == one["before"]
    same = gains([base] * 3, [posts[0]] * 3, draws=300)["judge_reward"]
    assert same["ci95"] == pytest.approx(one["ci95"])  # repeating a run is no evidence
    pooled = summarise(posts, draws=10)
    assert (pooled["clips"], pooled["continuations"]) == (CLIPS, 3 * CLIPS)


def test_inconsistent_clips_are_named(base):
    with pytest.raises(InputError, match="generated frames must be of 48 clips of 5 actions"):
        Scored(
            DOOM, base.commanded, base.reward, base.judge, base.generated[:, 1:], base.real,
            base.maps,
        )  # fmt: skip


def test_verdict_of_a_real_gain(base):
    post = scored(0.85, 0.85, noise=15, seed=2)
    said = verdict(gains(base, post, draws=300), summarise(scored(0.95, 0.95), draws=10))
    assert said[0].startswith("The post-trained model follows its actions better")
    assert any("of the way from the base to the ceiling" in s for s in said)
    assert any(s.startswith("Picture quality held") for s in said)
    assert not any(s.startswith(WARNING) for s in said)


def test_verdict_sees_a_hacked_reward(base):
    said = sentences(base, scored(0.9, 0.6, seed=1))
    assert said[0].startswith(NOT_SHOWN)
    assert warned(said, "the reward rose and the judge did not")


def test_verdict_sees_a_hacked_reward_with_a_worse_judge(base):
    said = sentences(base, scored(0.9, 0.3, seed=1))
    assert warned(said[:1], "follows its actions worse")
    assert warned(said, "the reward rose and the judge did not")


def test_verdict_when_nothing_rose(base):
    said = sentences(base, base)
    assert said[0].startswith(NOT_SHOWN)
    assert said[1].startswith("The reward itself did not rise")
    assert not warned(said, "the reward rose")


@pytest.mark.parametrize(
    ("spoiled", "phrase"),
    [
        ({"motion": 0.8, "noise": 0}, "motion shrank"),
        ({"motion": 0.2, "noise": 0}, "collapsing into stills"),
        ({"brightness": 0.8}, "the frames darkened"),
        ({"drift": 1.0}, "Fréchet distance in the judge's features"),
        ({"noise": 40}, "PSNR fell"),
    ],
)
def test_verdict_sees_spoiled_pictures(spoiled, phrase):
    base = scored(noise=0) if spoiled.get("noise") == 0 else scored()
    said = sentences(base, scored(0.85, 0.85, seed=1, **spoiled))
    assert warned(said, phrase)
    assert not any(s.startswith("Picture quality held") for s in said)


def test_verdict_against_the_control(base):
    strong = summarise(scored(0.95, 0.95), draws=10)
    weak = summarise(scored(0.5, 0.5), draws=10)
    post = scored(0.8, 0.8, seed=1)
    assert warned(sentences(base, post, control=strong), "does as well or better")
    assert any("Against the control" in s for s in sentences(base, post, control=weak))


@pytest.mark.parametrize(
    ("x", "digits", "text"),
    [(0.12345, 3, "0.123"), (38.64, None, "38.6"), (231.4, None, "231"), (0.00649, None, "0.00649"),
     (3e-13, None, "0")],
)  # fmt: skip
def test_figures_for_people(x, digits, text):
    assert figure(x, digits) == text


def test_percent_for_people():
    assert [percent(x) for x in (0.0749, -0.2, -1e-5, None)] == ["+7.5%", "-20.0%", "0.0%", "n/a"]
