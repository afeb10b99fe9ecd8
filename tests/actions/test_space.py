"""Bins follow the published law, keys cancel, tokens tell everything apart."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlir.actions.space import DOOM, MINECRAFT, ActionSpace, CameraAxis, KeyGroup, action_space
from rlir.errors import InputError

DOOM_YAW = DOOM.axes[0]
MINEWORLD = CameraAxis("pitch", source="dy", max_degrees=90.0, mu=11.4887, size=21)
VPT = CameraAxis("yaw", source="dx", max_degrees=10.0, mu=10.0, size=11)
AXES = [DOOM_YAW, MINEWORLD, VPT]
WIDE = ActionSpace("wide", (MINEWORLD, VPT), (*DOOM.groups, KeyGroup("hotbar", tuple("123456789"))))
SPACES = [DOOM, MINECRAFT, WIDE]

axes = pytest.mark.parametrize("axis", AXES, ids=lambda a: f"{a.max_degrees:g}x{a.size}")
spaces = pytest.mark.parametrize("space", SPACES, ids=lambda s: s.name)


def published_bin(axis: CameraAxis, degrees: float) -> float:
    """encode(x) = sign(x) max log(1 + mu|x|/max) / log(1 + mu), then bins of an equal size."""
    x = min(max(degrees, -axis.max_degrees), axis.max_degrees)
    law = math.copysign(
        axis.max_degrees
        * math.log(1 + axis.mu * abs(x) / axis.max_degrees)
        / math.log(1 + axis.mu),
        x,
    )
    bin_size = 2 * axis.max_degrees / (axis.size - 1)
    return (law + axis.max_degrees) / bin_size


def test_mineworld_and_vpt_have_their_bin_sizes() -> None:
    assert 2 * MINEWORLD.max_degrees / (MINEWORLD.size - 1) == 9
    assert 2 * VPT.max_degrees / (VPT.size - 1) == 2


@axes
@given(share=st.floats(-1.5, 1.5))
def test_bins_are_those_of_the_published_law(axis: CameraAxis, share: float) -> None:
    degrees = share * axis.max_degrees
    exact = published_bin(axis, degrees)
    found = int(axis.encode(np.array(degrees)))
    assert abs(found - exact) <= 0.5 + 1e-9
    assert 0 <= found < axis.size


def test_vpt_centres_are_the_published_ones() -> None:
    half = [0, 0.62, 1.61, 3.22, 5.81, 10]
    published = [-x for x in half[:0:-1]] + half
    np.testing.assert_allclose(VPT.centres(), published, atol=0.005)


@axes
def test_encoding_a_centre_gives_its_bin(axis: CameraAxis) -> None:
    np.testing.assert_array_equal(axis.encode(axis.centres()), np.arange(axis.size))


@axes
def test_the_middle_bin_is_rest_and_the_ends_are_the_limits(axis: CameraAxis) -> None:
    centres = axis.centres()
    assert centres[axis.size // 2] == 0
    np.testing.assert_allclose(centres[[0, -1]], [-axis.max_degrees, axis.max_degrees])
    assert int(axis.encode(np.array(0.0))) == axis.size // 2


@axes
@given(st.lists(st.floats(-400, 400), min_size=2, max_size=20))
def test_a_wider_turn_never_has_a_lower_bin(axis: CameraAxis, turns: list[float]) -> None:
    bins = axis.encode(np.sort(np.array(turns)))
    assert (np.diff(bins) >= 0).all()


@axes
@given(st.floats(0, 1e6))
def test_left_and_right_are_alike_and_beyond_the_limits_is_clipped(
    axis: CameraAxis, degrees: float
) -> None:
    left, right = axis.encode(np.array([-degrees, degrees]))
    # A turn on the edge of two bins may round to the even one on both sides.
    assert left + right in (axis.size - 1, axis.size - 2, axis.size)
    if degrees >= axis.max_degrees:
        assert (left, right) == (0, axis.size - 1)


@pytest.mark.parametrize("size", [0, 1, 2, 10, -3])
def test_an_axis_has_a_middle_bin(size: int) -> None:
    with pytest.raises(InputError, match=f"size must be odd and >= 3, got {size}"):
        CameraAxis("yaw", "dx", 10.0, 10.0, size)


@pytest.mark.parametrize(
    ("pressed", "expected"),
    [
        (set(), 0),
        ({"key.keyboard.w"}, 1),
        ({"key.keyboard.s"}, 2),
        ({"key.keyboard.w", "key.keyboard.s"}, 0),
        ({"key.keyboard.w", "key.keyboard.a", "mouse.0"}, 1),
    ],
)
def test_keys_that_are_pressed_together_cancel(pressed: set[str], expected: int) -> None:
    assert DOOM.groups[0].encode(pressed) == expected


def random_actions(space: ActionSpace, seed: int, *shape: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.stack([rng.integers(0, size, shape) for size in space.factor_sizes], -1)


@spaces
@given(seed=st.integers(0, 2**32 - 1))
def test_mirrored_twice_is_the_identity(space: ActionSpace, seed: int) -> None:
    actions = random_actions(space, seed, 5, 3)
    before = actions.copy()
    np.testing.assert_array_equal(space.mirrored(space.mirrored(actions)), actions)
    np.testing.assert_array_equal(actions, before)


def test_a_mirror_swaps_left_and_right_and_nothing_else() -> None:
    names = list(DOOM.factor_names)
    action = np.array([9, 1, 1, 1])
    assert names == ["yaw", "forward_back", "left_right", "attack"]
    np.testing.assert_array_equal(DOOM.mirrored(action), [1, 1, 2, 1])
    # In degrees: what turned right by so much turns left by as much.
    assert DOOM_YAW.centres()[9] == pytest.approx(-DOOM_YAW.centres()[1])


@spaces
def test_every_class_of_every_factor_has_a_token_of_its_own(space: ActionSpace) -> None:
    seen = {0: "begin", 1: "end"}
    for factor, size in enumerate(space.factor_sizes):
        for value in range(size):
            action = np.zeros(len(space.factors), np.int64)
            action[factor] = value
            token = int(space.to_tokens(action)[1 + factor])
            assert seen.setdefault(token, (factor, value)) == (factor, value)
    assert sorted(seen) == list(range(space.vocabulary))


@spaces
@given(seed=st.integers(0, 2**32 - 1))
def test_different_actions_have_different_blocks(space: ActionSpace, seed: int) -> None:
    actions = random_actions(space, seed, 40)
    blocks = space.to_tokens(actions)
    assert blocks.shape == (40, space.block_tokens)
    assert blocks.dtype == np.int64
    assert (blocks[:, 0] == 0).all()
    assert (blocks[:, -1] == 1).all()
    assert len(np.unique(blocks, axis=0)) == len(np.unique(actions, axis=0))


@spaces
@pytest.mark.parametrize("wrong", ["high", "low"])
def test_a_class_out_of_range_is_refused_and_not_another_factors_token(
    space: ActionSpace, wrong: str
) -> None:
    for factor, size in enumerate(space.factor_sizes):
        actions = np.zeros((2, len(space.factors)), np.int64)
        actions[1, factor] = size if wrong == "high" else -1
        with pytest.raises(InputError, match=r"actions: classes of .* must be from 0 and below"):
            space.to_tokens(actions)


def test_actions_of_another_number_of_factors_are_refused() -> None:
    with pytest.raises(InputError, match=r"must be 4 factors of doom, got shape \(2, 3\)"):
        DOOM.to_tokens(np.zeros((2, 3)))


def test_spaces_go_by_name() -> None:
    assert action_space("doom") is DOOM
    assert action_space("minecraft") is MINECRAFT
    with pytest.raises(
        InputError, match=r"must be one of \['doom', 'minecraft', 'mineworld'\], got 'quake'"
    ):
        action_space("quake")


@spaces
@given(seed=st.integers(0, 2**32 - 1))
def test_an_action_is_described_by_what_is_not_at_rest(space: ActionSpace, seed: int) -> None:
    action = random_actions(space, seed)
    text = space.describe(action)
    assert text.count(" deg") == sum(
        int(action[i]) != axis.size // 2 for i, axis in enumerate(space.axes)
    )
    for i, group in enumerate(space.groups, len(space.axes)):
        assert (f"{group.name}." in text) == bool(action[i])


def test_no_action_is_rest() -> None:
    assert DOOM.describe(np.array([5, 0, 0, 0])) == "rest"


def test_minecraft_has_mineworlds_block() -> None:
    assert MINECRAFT.block_tokens == 11
    assert MINECRAFT.factor_sizes == (21, 21, 10, 3, 3, 3, 3, 2, 3)


@pytest.mark.parametrize(
    ("pressed", "classes"),
    [
        (set(), (0, 0, 0, 0, 0, 0, 0)),
        ({"key.keyboard.w", "mouse.1"}, (0, 1, 0, 0, 1, 0, 0)),
        ({"key.keyboard.3", "key.keyboard.7", "key.keyboard.d"}, (0, 0, 2, 0, 0, 0, 0)),
        ({"key.keyboard.9", "mouse.0", "mouse.1"}, (9, 0, 0, 0, 0, 0, 0)),
        ({"key.keyboard.space", "key.keyboard.left.shift"}, (0, 0, 0, 0, 0, 0, 0)),
        ({"key.keyboard.space", "key.keyboard.left.control"}, (0, 0, 0, 1, 0, 1, 0)),
        ({"key.keyboard.q", "key.keyboard.e", "key.keyboard.escape"}, (0, 0, 0, 0, 0, 0, 1)),
    ],
)
def test_keys_that_mineworld_releases_cancel(pressed: set[str], classes: tuple[int, ...]) -> None:
    assert MINECRAFT.encode_keys(pressed) == classes


@axes
def test_edges_lie_between_bins(axis: CameraAxis) -> None:
    edges = axis.edges()
    middle = axis.size // 2
    assert edges.shape == (middle,)
    np.testing.assert_array_equal(axis.encode(edges * (1 - 1e-9)), middle + np.arange(middle))
    np.testing.assert_array_equal(axis.encode(edges * (1 + 1e-9)), middle + 1 + np.arange(middle))


def test_a_space_refuses_keys_it_cannot_tell_apart() -> None:
    group = KeyGroup("a", ("x", "y"))
    with pytest.raises(InputError, match="keys must be in one group"):
        ActionSpace("s", (), (group, KeyGroup("b", ("y",))))
    with pytest.raises(InputError, match=r"conflicts must be pairs of its keys, got \('x', 'z'\)"):
        ActionSpace("s", (), (group,), (("x", "z"),))
