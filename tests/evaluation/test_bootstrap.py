"""The vectorised bootstrap equals a loop over resampled clips, and its intervals cover."""

import numpy as np
import pytest

from rlir.actions.space import DOOM
from rlir.errors import InputError
from rlir.evaluation.bootstrap import (
    GROUPS,
    bootstrap,
    bootstrap_change,
    clip_weights,
    groups,
    jackknife,
    jackknife_change,
)
from rlir.evaluation.following import following, join, tally


class Mean:
    """The simplest sample: the mean of one value a clip."""

    def __init__(self, x):
        self.x = np.asarray(x, float)
        self.clips = len(self.x)

    def scores(self, weights):
        return {"mean": weights @ self.x / weights.sum(1)}


def actions(n, t, right, seed):
    rng = np.random.default_rng(seed)

    def sample():
        return np.stack([rng.integers(0, s, (n, t)) for s in DOOM.factor_sizes], -1)

    commanded = sample()
    return commanded, np.where(rng.random(commanded.shape) < right, commanded, sample())


def test_equals_a_loop_over_resampled_clips():
    commanded, before = actions(13, 5, 0.5, seed=0)
    _, after = actions(13, 5, 0.7, seed=0)
    draws = 40
    weights = clip_weights(13, draws, seed=3).astype(int)
    naive = {"f1_macro": [], "reward": [], "camera_l1": []}
    for row in weights:
        chosen = np.repeat(np.arange(13), row)
        figures = [following(tally(commanded[chosen], x[chosen], DOOM)) for x in (before, after)]
        for name, values in naive.items():
            values.append([f[name] for f in figures])
    a, b = tally(commanded, before, DOOM), tally(commanded, after, DOOM)
    single, change = bootstrap(a, draws, seed=3), bootstrap_change(a, b, draws, seed=3)
    for name, values in naive.items():
        x, y = np.array(values).T
        ends = [2.5, 97.5]
        assert single[name]["ci95"] == pytest.approx(np.percentile(x, ends))
        assert change[name]["ci95"] == pytest.approx(np.percentile((y - x) / x, ends))
        assert change[name]["ci95_absolute"] == pytest.approx(np.percentile(y - x, ends))
        exact = following(a)[name], following(b)[name]
        assert single[name]["value"] == pytest.approx(exact[0])
        assert change[name]["absolute"] == pytest.approx(exact[1] - exact[0])
        assert change[name]["relative"] == pytest.approx(exact[1] / exact[0] - 1)


def test_interval_covers_the_true_mean():
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(400):
        low, high = bootstrap(Mean(rng.normal(2.0, 1.0, 60)), 300, seed=trial)["mean"]["ci95"]
        covered += low <= 2.0 <= high
    assert 0.90 <= covered / 400 <= 0.97  # percentile intervals of 60 clips: a little below .95


def test_pairing_removes_what_clips_share():
    rng = np.random.default_rng(1)
    shared = rng.normal(5.0, 2.0, 80)
    change = bootstrap_change(Mean(shared), Mean(shared + 0.1), seed=0)["mean"]
    assert change["ci95_absolute"] == pytest.approx([0.1, 0.1])
    low, high = bootstrap(Mean(shared), seed=0)["mean"]["ci95"]
    assert high - low > 0.5


def test_no_change_is_exactly_zero():
    commanded, recovered = actions(20, 4, 0.5, seed=2)
    same = tally(commanded, recovered, DOOM)
    for change in bootstrap_change(same, same, 50).values():
        assert change["absolute"] == 0
        assert change["ci95_absolute"] == [0, 0]


def test_reproducible_and_seeded():
    sample = Mean(np.random.default_rng(3).normal(size=30))
    assert bootstrap(sample, 100, seed=1) == bootstrap(sample, 100, seed=1)
    assert bootstrap(sample, 100, seed=1) != bootstrap(sample, 100, seed=2)


def test_shared_clips_are_drawn_together():
    weights = clip_weights(6, 50, ids=np.array([7, 8, 9, 7, 8, 9]))
    np.testing.assert_array_equal(weights[:, :3], weights[:, 3:])
    assert (weights.sum(1) == 6).all()


def test_repeating_a_run_does_not_narrow_the_interval():
    commanded, recovered = actions(40, 5, 0.6, seed=4)
    one = tally(commanded, recovered, DOOM)
    ids = np.arange(40)
    once = bootstrap(one, 500, ids=ids)
    thrice = bootstrap(join([one] * 3), 500, ids=np.tile(ids, 3))
    for name, interval in once.items():
        assert thrice[name]["ci95"] == pytest.approx(interval["ci95"]), name


def test_relative_to_nothing_is_null():
    change = bootstrap_change(Mean(np.zeros(5)), Mean(np.ones(5)), 20)["mean"]
    assert change["relative"] is None
    assert change["ci95"] is None
    assert change["ci95_absolute"] == [1, 1]


def test_signs_are_relative_to_the_size_of_a_negative_figure():
    assert bootstrap_change(Mean([-2, -2]), Mean([-1, -1]), 5)["mean"]["relative"] == 0.5


def test_jackknife_of_a_mean_is_the_standard_error():
    x = np.random.default_rng(5).normal(size=GROUPS)
    left_out = (x.sum() - x) / (GROUPS - 1)
    low, high = jackknife(x.mean(), left_out)["ci95"]
    assert (high - low) / 2 == pytest.approx(2.093 * x.std(ddof=1) / np.sqrt(GROUPS))
    change = jackknife_change(x.mean(), x.mean() + 1, (left_out, left_out + 1))
    assert change["ci95_absolute"] == pytest.approx([1, 1])


def test_groups_hold_equal_clips_together():
    assert groups(GROUPS - 1) is None
    ids = np.tile(np.arange(GROUPS + 3), 2)
    group = groups(len(ids), ids)
    np.testing.assert_array_equal(group[: GROUPS + 3], group[GROUPS + 3 :])
    assert set(group) == set(range(GROUPS))


def test_bad_input_is_named():
    with pytest.raises(InputError, match="same clips, got 2 and 3"):
        bootstrap_change(Mean([1, 2]), Mean([1, 2, 3]))
    with pytest.raises(InputError, match="draws must be >= 1"):
        bootstrap(Mean([1]), draws=0)
    with pytest.raises(InputError, match="ids must be"):
        bootstrap(Mean([1, 2]), ids=np.array([1]))
