"""Action spaces: what a keyboard and a mouse do between two frames, as classes and as tokens.

An action is a vector of *factors*. A factor is a camera axis (mouse movement in degrees, in
mu-law bins) or a group of keys that exclude one another (forward/back). The world model reads an
action as a block of tokens in MineWorld's order: begin, camera axes, key groups, end
(arXiv 2504.08388); the inverse dynamics model predicts one class per factor.
"""

import math
from dataclasses import dataclass

import numpy as np

from rlir.errors import InputError

# VPT's contractor recordings: a 2400 pixel mouse movement is a full turn (arXiv 2206.11795).
DEGREES_PER_PIXEL = 360.0 / 2400.0


@dataclass(frozen=True)
class KeyGroup:
    """Keys that exclude one another. Class 0 is none; class i is ``keys[i - 1]``.

    Keys of the group that are pressed together cancel out, as in MineWorld.
    """

    name: str
    keys: tuple[str, ...]

    @property
    def size(self) -> int:
        return 1 + len(self.keys)

    @property
    def labels(self) -> tuple[str, ...]:
        return ("-", *(key.rsplit(".", 1)[-1] for key in self.keys))

    def encode(self, pressed: set[str]) -> int:
        held = [i for i, key in enumerate(self.keys) if key in pressed]
        return held[0] + 1 if len(held) == 1 else 0


@dataclass(frozen=True)
class CameraAxis:
    """A camera axis in mu-law bins: fine near zero, coarse for fast turns.

    ``encode(x) = sign(x) * max * log(1 + mu |x| / max) / log(1 + mu)``, then equal bins over
    [-max, max] (VPT, MineWorld). Degrees beyond +-max are clipped.
    """

    name: str
    source: str  # "dx" or "dy", the mouse axis
    max_degrees: float
    mu: float
    size: int  # odd, so that the middle bin is rest

    def __post_init__(self) -> None:
        if self.size < 3 or self.size % 2 == 0:
            raise InputError(f"camera axis {self.name}: size must be odd and >= 3, got {self.size}")

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(f"{d:+.0f}" for d in self.centres())

    def centres(self) -> np.ndarray:
        """Degrees at the centre of each bin, float64 [size]."""
        encoded = np.linspace(-1.0, 1.0, self.size)
        scale = self.max_degrees / self.mu
        return np.sign(encoded) * scale * np.expm1(np.abs(encoded) * math.log1p(self.mu))

    def edges(self) -> np.ndarray:
        """Degrees between bins on the positive side, ascending, float64 [(size - 1) / 2]."""
        half = (self.size - 1) // 2
        encoded = (np.arange(half) + 0.5) / half
        return self.max_degrees / self.mu * np.expm1(encoded * math.log1p(self.mu))

    def encode(self, degrees: np.ndarray) -> np.ndarray:
        """Bin of each angle, int64 of the same shape."""
        x = np.clip(np.asarray(degrees, np.float64) / self.max_degrees, -1.0, 1.0)
        law = np.sign(x) * np.log1p(self.mu * np.abs(x)) / math.log1p(self.mu)
        return np.rint((law + 1.0) * (self.size - 1) / 2).astype(np.int64)


@dataclass(frozen=True)
class ActionSpace:
    """Camera axes and key groups, in the order in which factors and tokens stand.

    Token ids count from 0 (``begin``): the world model adds its number of visual codes.
    """

    name: str
    axes: tuple[CameraAxis, ...]
    groups: tuple[KeyGroup, ...]
    conflicts: tuple[tuple[str, str], ...] = ()
    """Pairs of keys of different groups that cancel each other out when pressed together."""

    def __post_init__(self) -> None:
        keys = [key for group in self.groups for key in group.keys]
        if len(set(keys)) < len(keys):
            raise InputError(f"action space {self.name}: keys must be in one group, got {keys}")
        for pair in self.conflicts:
            if len(set(pair) & set(keys)) < 2:
                raise InputError(
                    f"action space {self.name}: conflicts must be pairs of its keys, got {pair}"
                )

    def opponents(self, key: str) -> frozenset[str]:
        """Keys that take this key's effect if they are pressed as well."""
        rivals = {b for pair in self.conflicts for b in pair if key in pair}
        group = next((g.keys for g in self.groups if key in g.keys), ())
        return frozenset({*rivals, *group} - {key})

    def encode_keys(self, pressed: set[str]) -> tuple[int, ...]:
        """Class of each key group when these keys are pressed."""
        counts = {key for key in pressed if not self.opponents(key) & pressed}
        return tuple(group.encode(counts) for group in self.groups)

    @property
    def factors(self) -> tuple[CameraAxis | KeyGroup, ...]:
        return (*self.axes, *self.groups)

    @property
    def factor_sizes(self) -> tuple[int, ...]:
        return tuple(f.size for f in self.factors)

    @property
    def factor_names(self) -> tuple[str, ...]:
        return tuple(f.name for f in self.factors)

    @property
    def block_tokens(self) -> int:
        """Tokens an action takes in the stream: begin, one per factor, end."""
        return len(self.factors) + 2

    @property
    def vocabulary(self) -> int:
        """Token ids that blocks are made of: below this number."""
        return sum(self.factor_sizes) + 2

    @property
    def ends(self) -> tuple[int, int]:
        """Token ids of begin and end."""
        return 0, 1

    def class_tokens(self) -> tuple[np.ndarray, ...]:
        """Of each factor, the token id of each class, int64: one factor after another from 2."""
        ids = np.arange(2, self.vocabulary, dtype=np.int64)
        return tuple(np.split(ids, np.cumsum(self.factor_sizes)[:-1]))

    def to_tokens(self, actions: np.ndarray) -> np.ndarray:
        """Classes [..., factors] to token blocks [..., block_tokens], int64."""
        actions = np.asarray(actions, np.int64)
        if actions.shape[-1] != len(self.factors):
            raise InputError(
                f"actions: last dimension must be {len(self.factors)} factors of "
                f"{self.name}, got shape {tuple(actions.shape)}"
            )
        if ((actions < 0) | (actions >= np.array(self.factor_sizes))).any():
            raise InputError(
                f"actions: classes of {self.name} must be from 0 and below {self.factor_sizes}, "
                f"got {actions.min()} to {actions.max()}"
            )
        block = np.empty((*actions.shape[:-1], self.block_tokens), np.int64)
        block[..., 0], block[..., -1] = self.ends
        for i, tokens in enumerate(self.class_tokens()):
            block[..., 1 + i] = tokens[actions[..., i]]
        return block

    def mirrored(self, actions: np.ndarray) -> np.ndarray:
        """The actions that a left-right mirrored video shows."""
        out = np.array(actions)
        for i, factor in enumerate(self.factors):
            if isinstance(factor, CameraAxis) and factor.source == "dx":
                out[..., i] = factor.size - 1 - out[..., i]
            elif factor.name == "left_right":
                out[..., i] = np.where(out[..., i] > 0, 3 - out[..., i], 0)
        return out

    def describe(self, action: np.ndarray) -> str:
        """One action for people, such as ``+9 deg forward``."""
        words = []
        for factor, value in zip(self.factors, np.asarray(action).tolist(), strict=True):
            if isinstance(factor, CameraAxis):
                words.append(f"{factor.labels[value]} deg" if value != factor.size // 2 else "")
            elif value:
                words.append(f"{factor.name}.{factor.labels[value]}")
        return " ".join(w for w in words if w) or "rest"


@dataclass(frozen=True)
class ButtonSpace(ActionSpace):
    """A space whose tokens are buttons, as MineWorld's (arXiv 2504.08388).

    Ids count the buttons, then the bins of each axis, then begin, null and end. Of a group the
    token is its pressed button, or null.
    """

    buttons: tuple[str, ...] = ()
    """Keys in the order of their token ids; some may be in no group."""

    def __post_init__(self) -> None:
        super().__post_init__()
        keys = {key for group in self.groups for key in group.keys}
        if missing := sorted(keys - set(self.buttons)):
            raise InputError(
                f"action space {self.name}: buttons must hold its keys, found no {missing[0]}"
            )

    @property
    def vocabulary(self) -> int:
        return len(self.buttons) + sum(axis.size for axis in self.axes) + 3

    @property
    def ends(self) -> tuple[int, int]:
        return self.vocabulary - 3, self.vocabulary - 1

    def class_tokens(self) -> tuple[np.ndarray, ...]:
        null, first = self.vocabulary - 2, len(self.buttons)
        out = []
        for axis in self.axes:
            out.append(np.arange(first, first + axis.size, dtype=np.int64))
            first += axis.size
        for group in self.groups:
            held = [self.buttons.index(key) for key in group.keys]
            out.append(np.array([null, *held], np.int64))
        return tuple(out)


# Doom, turned at up to 20 degrees a step of five tics: MineWorld's mu with 11 bins.
DOOM = ActionSpace(
    name="doom",
    axes=(CameraAxis("yaw", source="dx", max_degrees=20.0, mu=11.4887, size=11),),
    groups=(
        KeyGroup("forward_back", ("key.keyboard.w", "key.keyboard.s")),
        KeyGroup("left_right", ("key.keyboard.a", "key.keyboard.d")),
        KeyGroup("attack", ("mouse.0",)),
    ),
)

# Minecraft as MineWorld conditions on it (arXiv 2504.08388): camera bins and the order of the
# factors are its action block's; keys go by the names of VPT's recordings. Pairs that MineWorld
# releases stand in one group, or, across groups, in `conflicts`.
MINECRAFT = ActionSpace(
    name="minecraft",
    axes=(
        CameraAxis("pitch", source="dy", max_degrees=90.0, mu=11.4887, size=21),
        CameraAxis("yaw", source="dx", max_degrees=90.0, mu=11.4887, size=21),
    ),
    groups=(
        KeyGroup("hotbar", tuple(f"key.keyboard.{i}" for i in range(1, 10))),
        KeyGroup("forward_back", ("key.keyboard.w", "key.keyboard.s")),
        KeyGroup("left_right", ("key.keyboard.a", "key.keyboard.d")),
        KeyGroup("sprint_sneak", ("key.keyboard.left.control", "key.keyboard.left.shift")),
        KeyGroup("use_attack", ("mouse.1", "mouse.0")),
        KeyGroup("jump", ("key.keyboard.space",)),
        KeyGroup("drop_pick", ("key.keyboard.q", "mouse.2")),
    ),
    conflicts=(("key.keyboard.space", "key.keyboard.left.shift"),),
)

# The same classes in the token ids of MineWorld's checkpoints.
MINEWORLD = ButtonSpace(
    name="mineworld",
    axes=MINECRAFT.axes,
    groups=MINECRAFT.groups,
    conflicts=MINECRAFT.conflicts,
    buttons=(
        "mouse.1",  # use
        "mouse.0",  # attack
        "key.keyboard.w",  # forward
        "key.keyboard.s",  # back
        "key.keyboard.a",  # left
        "key.keyboard.d",  # right
        "key.keyboard.space",  # jump
        "key.keyboard.left.shift",  # sneak
        "key.keyboard.left.control",  # sprint
        "key.keyboard.q",  # drop
        "key.keyboard.f",  # swapHands
        "mouse.2",  # pickItem
        "key.keyboard.e",  # inventory
        "key.keyboard.escape",  # ESC
        *(f"key.keyboard.{i}" for i in range(1, 10)),  # hotbar.1 to hotbar.9
    ),
)

SPACES = {space.name: space for space in (DOOM, MINECRAFT, MINEWORLD)}


def action_space(name: str) -> ActionSpace:
    """The action space of that name."""
    try:
        return SPACES[name]
    except KeyError:
        raise InputError(f"action space must be one of {sorted(SPACES)}, got {name!r}") from None
