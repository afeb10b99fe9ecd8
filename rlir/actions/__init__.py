"""Action spaces: keys and mouse movement as classes, tokens and degrees."""

from rlir.actions.heads import MINECRAFT_VPT, ActionHeads
from rlir.actions.space import (
    DOOM,
    MINECRAFT,
    MINEWORLD,
    ActionSpace,
    ButtonSpace,
    CameraAxis,
    KeyGroup,
    action_space,
)

__all__ = [
    "DOOM",
    "MINECRAFT",
    "MINECRAFT_VPT",
    "MINEWORLD",
    "ActionHeads",
    "ActionSpace",
    "ButtonSpace",
    "CameraAxis",
    "KeyGroup",
    "action_space",
]
