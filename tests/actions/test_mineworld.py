"""MineWorld's blocks of action tokens, by hand; its camera bins for every movement of a mouse."""

import math

import numpy as np
import pytest

from rlir.actions.space import DEGREES_PER_PIXEL, MINECRAFT, MINEWORLD, ButtonSpace, action_space
from rlir.errors import InputError

BEGIN, NULL, END = 65, 66, 67
REST = (33, 54)
"""The middle bins: 23 buttons, then 21 bins of pitch and 21 of yaw."""
KEYS = {
    "use": "mouse.1",
    "attack": "mouse.0",
    "forward": "key.keyboard.w",
    "back": "key.keyboard.s",
    "left": "key.keyboard.a",
    "right": "key.keyboard.d",
    "jump": "key.keyboard.space",
    "sneak": "key.keyboard.left.shift",
    "sprint": "key.keyboard.left.control",
    "drop": "key.keyboard.q",
    "swapHands": "key.keyboard.f",
    "pickItem": "mouse.2",
    "inventory": "key.keyboard.e",
    "ESC": "key.keyboard.escape",
    **{f"hotbar.{i}": f"key.keyboard.{i}" for i in range(1, 10)},
}
"""In the order of their token ids."""


def block(names: str = "", pitch: float = 0.0, yaw: float = 0.0) -> list[int]:
    """The tokens of pressed buttons and of degrees."""
    camera = [
        int(axis.encode(np.array(x))) for axis, x in zip(MINEWORLD.axes, (pitch, yaw), strict=True)
    ]
    keys = MINEWORLD.encode_keys({KEYS[name] for name in names.split()})
    return MINEWORLD.to_tokens(np.array([*camera, *keys])).tolist()


def test_it_goes_by_name_and_has_minecrafts_classes() -> None:
    assert action_space("mineworld") is MINEWORLD
    assert MINEWORLD.factors == MINECRAFT.factors
    assert MINEWORLD.conflicts == MINECRAFT.conflicts
    assert (MINEWORLD.block_tokens, MINEWORLD.vocabulary) == (11, 68)
    assert tuple(KEYS.values()) == MINEWORLD.buttons


@pytest.mark.parametrize(
    ("names", "tokens"),
    [
        # hotbar, forward/back, left/right, sprint/sneak, use/attack, jump, drop/pickItem
        ("", [NULL] * 7),
        ("forward", [NULL, 2, NULL, NULL, NULL, NULL, NULL]),
        ("back attack", [NULL, 3, NULL, NULL, 1, NULL, NULL]),
        ("left use", [NULL, NULL, 4, NULL, 0, NULL, NULL]),
        ("right jump", [NULL, NULL, 5, NULL, NULL, 6, NULL]),
        ("sneak", [NULL, NULL, NULL, 7, NULL, NULL, NULL]),
        ("sprint jump forward", [NULL, 2, NULL, 8, NULL, 6, NULL]),
        ("drop", [NULL, NULL, NULL, NULL, NULL, NULL, 9]),
        ("pickItem", [NULL, NULL, NULL, NULL, NULL, NULL, 11]),
        ("hotbar.1", [14, NULL, NULL, NULL, NULL, NULL, NULL]),
        ("hotbar.9 forward", [22, 2, NULL, NULL, NULL, NULL, NULL]),
        ("swapHands inventory ESC", [NULL] * 7),
        # Pairs that are released.
        ("forward back", [NULL] * 7),
        ("left right forward", [NULL, 2, NULL, NULL, NULL, NULL, NULL]),
        ("jump sneak", [NULL] * 7),
        ("sprint sneak attack", [NULL, NULL, NULL, NULL, 1, NULL, NULL]),
        ("attack use back", [NULL, 3, NULL, NULL, NULL, NULL, NULL]),
    ],
)
def test_buttons(names: str, tokens: list[int]) -> None:
    assert block(names) == [BEGIN, *REST, *tokens, END]


@pytest.mark.parametrize(
    ("pitch", "yaw", "tokens"),
    [
        (0.0, 0.0, (33, 54)),
        (-90.0, 90.0, (23, 64)),
        (400.0, -91.0, (43, 44)),
        # 90 log(1 + mu 10 / 90) / log(1 + mu) = 29.3: 3.26 bins of 9 from the middle.
        (10.0, -10.0, (36, 51)),
        # 1 degree: 4.28, 0.48 of a bin. 1.05 degrees (7 pixels): 0.498; 1.2: 0.56.
        (1.0, -1.0, (33, 54)),
        (1.2, -1.2, (34, 53)),
        (30.0, 45.0, (39, 62)),
    ],
)
def test_the_camera(pitch: float, yaw: float, tokens: tuple[int, int]) -> None:
    assert block(pitch=pitch, yaw=yaw) == [BEGIN, *tokens, *[NULL] * 7, END]


def test_every_movement_of_a_mouse_has_the_published_bin() -> None:
    """Clipped, mu-law, bins of 9 degrees rounded to the nearest, as published, step by step."""
    for pixels in range(-700, 701):
        degrees = pixels * DEGREES_PER_PIXEL
        x = min(max(degrees, -90.0), 90.0)
        law = math.copysign(90.0 * math.log(1 + 11.4887 * abs(x) / 90.0) / math.log(12.4887), x)
        expected = round((law + 90.0) / 9.0)
        for axis in MINEWORLD.axes:
            assert int(axis.encode(np.array(degrees))) == expected, pixels


def test_blocks_of_many_actions() -> None:
    rng = np.random.default_rng(0)
    sizes = MINEWORLD.factor_sizes
    actions = np.stack([rng.integers(0, size, (5, 40)) for size in sizes], -1)
    blocks = MINEWORLD.to_tokens(actions)
    assert blocks.shape == (5, 40, 11)
    assert blocks.dtype == np.int64
    for action, tokens in zip(actions.reshape(-1, 9), blocks.reshape(-1, 11), strict=True):
        assert tokens.tolist() == MINEWORLD.to_tokens(action).tolist()
    assert len(np.unique(blocks.reshape(-1, 11), axis=0)) == len(
        np.unique(actions.reshape(-1, 9), axis=0)
    )
    used = {*range(23), *range(23, 65), BEGIN, NULL, END} - {10, 12, 13}  # in no group
    assert set(np.unique(MINEWORLD.to_tokens(every_class())).tolist()) == used


def every_class() -> np.ndarray:
    """Actions in which each class of each factor comes up."""
    longest = max(MINEWORLD.factor_sizes)
    return np.stack([np.arange(longest) % size for size in MINEWORLD.factor_sizes], -1)


def test_classes_out_of_range_are_refused() -> None:
    action = np.zeros(9, np.int64)
    for wrong in (-1, 21):
        action[0] = wrong
        with pytest.raises(InputError, match="classes of mineworld must be from 0 and below"):
            MINEWORLD.to_tokens(action)


def test_a_button_space_must_know_its_keys() -> None:
    with pytest.raises(InputError, match="buttons must hold its keys, found no "):
        ButtonSpace("s", (), MINEWORLD.groups, (), MINEWORLD.buttons[:-9])
