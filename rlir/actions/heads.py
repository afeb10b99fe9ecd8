"""What the outputs of an inverse dynamics model (IDM) mean in an action space.

An IDM need not speak in the classes that the world model is commanded in. VPT's
(arXiv 2206.11795) has 20 independent two-way buttons and 11 camera bins up to 10 degrees, whereas
MineWorld (arXiv 2504.08388) commands a class per group of exclusive keys and 21 bins up to 90
degrees. ``ActionHeads`` says how the one is read as the other.
"""

from dataclasses import dataclass, field

import numpy as np

from rlir.actions.space import MINECRAFT, ActionSpace, CameraAxis
from rlir.errors import InputError


@dataclass(frozen=True)
class HeadTables:
    """``ActionHeads`` as flat lists, which is how the native ops take it."""

    axis_sizes: tuple[int, ...]
    """Bins of each camera head."""
    group_sizes: tuple[int, ...]
    """Classes of each key group."""
    button_classes: tuple[int, ...]
    """Of each two-way button, its place among the classes of all groups one after another, or -1
    where the space does without it. Empty for class vectors."""
    button_opponents: tuple[int, ...]
    """Of each button, a bit for each button that takes its effect when held as well."""
    command_sizes: tuple[int, ...]
    """Classes of each factor that can be commanded."""
    command_classes: tuple[int, ...]
    """The head's class that each class of each factor asks for, one factor after another."""
    centres: tuple[float, ...]
    """Degrees at the centre of each bin of each camera head, one head after another."""
    edges: tuple[float, ...]
    """Degrees between the positive bins of each camera head, one head after another."""


@dataclass(frozen=True)
class ActionHeads:
    """How the heads of an inverse dynamics model read as an action space.

    Camera: one head an axis of the space, in the space's order, with bins of its own; commanded
    degrees are quantised again with these. Keys: a class vector for each key group, or two-way
    heads, one a button, of which those that exclude one another cancel out.
    """

    space: ActionSpace
    """What is commanded."""
    axes: tuple[CameraAxis, ...]
    """Bins of the camera heads."""
    buttons: tuple[str, ...] | None = None
    """Keys of the two-way heads in their order; None for a class vector a key group. A button
    that the space does not know is not used. A key of the space without a button cannot be read:
    commanding it asks for the class "none"."""
    tables: HeadTables = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        names = tuple(axis.name for axis in self.space.axes)
        found = tuple(axis.name for axis in self.axes)
        if found != names:
            raise InputError(f"action heads: axes must be {names} as in the space, got {found}")
        if self.buttons is not None and not 1 <= len(set(self.buttons)) == len(self.buttons) <= 63:
            raise InputError(
                f"action heads: buttons must be 1 to 63 different keys, got {self.buttons}"
            )
        object.__setattr__(self, "tables", self._tables())

    @property
    def sizes(self) -> tuple[int, ...]:
        """Classes of each factor as the heads read it."""
        return (*self.tables.axis_sizes, *self.tables.group_sizes)

    def _tables(self) -> HeadTables:
        groups = self.space.groups
        keys = [key for group in groups for key in group.keys]
        places: dict[str, int] = {}  # of a key among the classes of all groups
        start = 0
        for group in groups:
            places |= {key: start + group.keys.index(key) + 1 for key in group.keys}
            start += group.size
        buttons = self.buttons or ()
        commands: list[int] = []
        for head, axis in zip(self.axes, self.space.axes, strict=True):
            same = (head.max_degrees, head.mu, head.size) == (axis.max_degrees, axis.mu, axis.size)
            bins = np.arange(axis.size) if same else head.encode(axis.centres())
            commands += bins.tolist()
        for group in groups:
            readable = [self.buttons is None or key in buttons for key in group.keys]
            commands += [0, *(i + 1 if ok else 0 for i, ok in enumerate(readable))]
        centres = tuple(float(x) for axis in self.axes for x in axis.centres())
        edges = tuple(float(x) for axis in self.axes for x in axis.edges())
        return HeadTables(
            axis_sizes=tuple(axis.size for axis in self.axes),
            group_sizes=tuple(group.size for group in groups),
            button_classes=tuple(places.get(key, -1) for key in buttons),
            button_opponents=tuple(
                sum(1 << i for i, other in enumerate(buttons) if other in rivals)
                for rivals in (
                    self.space.opponents(key) if key in keys else frozenset() for key in buttons
                )
            ),
            command_sizes=self.space.factor_sizes,
            command_classes=tuple(commands),
            centres=centres,
            edges=edges,
        )


# The public VPT IDM: its buttons in their order, its camera heads (pitch before yaw).
VPT_BUTTONS = (
    "mouse.0",  # attack
    "key.keyboard.s",  # back
    "key.keyboard.w",  # forward
    "key.keyboard.space",  # jump
    "key.keyboard.a",  # left
    "key.keyboard.d",  # right
    "key.keyboard.left.shift",  # sneak
    "key.keyboard.left.control",  # sprint
    "mouse.1",  # use
    "key.keyboard.q",  # drop
    "key.keyboard.e",  # inventory
    *(f"key.keyboard.{i}" for i in range(1, 10)),  # hotbar
)
VPT_AXES = (
    CameraAxis("pitch", source="dy", max_degrees=10.0, mu=10.0, size=11),
    CameraAxis("yaw", source="dx", max_degrees=10.0, mu=10.0, size=11),
)
MINECRAFT_VPT = ActionHeads(MINECRAFT, VPT_AXES, VPT_BUTTONS)
"""Commands as MineWorld's, read by VPT's IDM. It has no button for pickItem, and its inventory
button is not part of the commands: MineWorld leaves frames with an open inventory out."""
