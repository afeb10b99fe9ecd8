"""Action following equals scikit-learn's figures, on random and on degenerate input."""

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support
from testkit import examples

from rlir.actions.space import DOOM, ActionSpace, CameraAxis, KeyGroup
from rlir.errors import InputError
from rlir.evaluation.following import confusion_counts, following, join, tally

KEYS_ONLY = ActionSpace("keys", (), (KeyGroup("jump", ("space",)), KeyGroup("lr", ("a", "d"))))
TWO_AXES = ActionSpace(
    "two",
    (CameraAxis("pitch", "dy", 90.0, 11.4887, 21), CameraAxis("yaw", "dx", 90.0, 11.4887, 21)),
    (KeyGroup("forward_back", ("w", "s")),),
)
SPACES = [DOOM, KEYS_ONLY, TWO_AXES]


def draw(space, n, t, seed):
    rng = np.random.default_rng(seed)
    return np.stack([rng.integers(0, size, (n, t)) for size in space.factor_sizes], -1)


def expected(commanded, recovered, space):
    tasks = {}
    for f, name in enumerate(space.factor_names):
        true, found = commanded[..., f].ravel(), recovered[..., f].ravel()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tasks[name] = {
                average: precision_recall_fscore_support(
                    true, found, average=average, zero_division=0
                )[:3]
                for average in ("macro", "micro")
            }
    return tasks


def check(commanded, recovered, space):
    figures = following(tally(commanded, recovered, space))
    tasks = expected(commanded, recovered, space)
    for i, kind in enumerate(("precision", "recall", "f1")):
        for name in space.factor_names:
            assert figures[f"{kind}_per_task"][name] == pytest.approx(tasks[name]["macro"][i])
        for average in ("macro", "micro"):
            mean = np.mean([task[average][i] for task in tasks.values()])
            assert figures[f"{kind}_{average}"] == pytest.approx(mean)
    equal = commanded == recovered
    assert figures["reward"] == pytest.approx(equal.mean())
    assert figures["reward_joint"] == pytest.approx(equal.all(-1).mean())
    if space.axes:
        centres = [axis.centres() for axis in space.axes]
        degrees = [
            np.abs(c[commanded[..., f]] - c[recovered[..., f]]).mean()
            for f, c in enumerate(centres)
        ]
        bins = np.abs(commanded - recovered)[..., : len(centres)].mean()
        assert figures["camera_l1"] == pytest.approx(np.mean(degrees))
        assert figures["camera_l1_bins"] == pytest.approx(bins)
    else:
        assert "camera_l1" not in figures


@pytest.mark.parametrize("space", SPACES, ids=lambda s: s.name)
@pytest.mark.parametrize(("n", "t"), [(1, 1), (3, 7), (19, 15)])
def test_equals_scikit_learn(space, n, t):
    commanded = draw(space, n, t, seed=0)
    recovered = np.where(
        np.random.default_rng(1).random(commanded.shape) < 0.6, commanded, draw(space, n, t, 2)
    )
    check(commanded, recovered, space)


@settings(max_examples=examples(40), deadline=None)
@given(st.data())
def test_equals_scikit_learn_on_any_input(data):
    space = data.draw(st.sampled_from(SPACES))
    n, t = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 5))

    def classes():
        factors = [
            data.draw(st.lists(st.integers(0, size - 1), min_size=n * t, max_size=n * t))
            for size in space.factor_sizes
        ]
        return np.array(factors).T.reshape(n, t, -1)

    check(classes(), classes(), space)


def test_constant_predictions():
    commanded = draw(DOOM, 5, 6, seed=3)
    check(commanded, np.zeros_like(commanded), DOOM)
    check(np.zeros_like(commanded), commanded, DOOM)


def test_perfect():
    commanded = draw(DOOM, 4, 3, seed=4)
    figures = following(tally(commanded, commanded, DOOM))
    for name in ("f1_macro", "precision_macro", "recall_micro", "reward", "reward_joint"):
        assert figures[name] == pytest.approx(1.0)
    assert figures["camera_l1"] == 0.0


def test_confusion_counts_are_a_clip_and_equal_scikit_learn():
    commanded, recovered = draw(DOOM, 6, 9, 5), draw(DOOM, 6, 9, 6)
    for f, counts in enumerate(confusion_counts(commanded, recovered, DOOM)):
        labels = np.arange(DOOM.factor_sizes[f])
        for n in range(6):
            wanted = confusion_matrix(commanded[n, :, f], recovered[n, :, f], labels=labels)
            np.testing.assert_array_equal(counts[n], wanted)


def test_weights_are_repeated_clips():
    commanded, recovered = draw(DOOM, 5, 4, 7), draw(DOOM, 5, 4, 8)
    weights = np.array([[1, 0, 2, 0, 2]])
    chosen = np.repeat(np.arange(5), weights[0])
    repeated = tally(commanded[chosen], recovered[chosen], DOOM).scores(np.ones((1, 5)))
    for name, value in tally(commanded, recovered, DOOM).scores(weights).items():
        assert value == pytest.approx(repeated[name]), name


def test_join_is_one_set_of_clips():
    commanded, recovered = draw(DOOM, 5, 4, 9), draw(DOOM, 5, 4, 10)
    parts = [tally(commanded[:2], recovered[:2], DOOM), tally(commanded[2:], recovered[2:], DOOM)]
    assert following(join(parts)) == following(tally(commanded, recovered, DOOM))


@pytest.mark.parametrize(
    ("commanded", "recovered", "message"),
    [
        (np.zeros((2, 3, 5), int), np.zeros((2, 3, 5), int), r"must be \[clips, actions, 4\]"),
        (np.zeros((2, 3, 4), int), np.zeros((2, 2, 4), int), "recovered must have shape"),
        (np.zeros((2, 3, 4), int), np.full((2, 3, 4), 11), "recovered must be classes below"),
        (np.zeros((0, 3, 4), int), np.zeros((0, 3, 4), int), "there must be an action"),
    ],
)
def test_bad_input_is_named(commanded, recovered, message):
    with pytest.raises(InputError, match=message):
        tally(commanded, recovered, DOOM)
