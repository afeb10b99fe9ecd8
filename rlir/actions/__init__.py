"""Action spaces: keys and mouse movement as classes, tokens and degrees."""

from rlir.actions.space import DOOM, ActionSpace, CameraAxis, KeyGroup, action_space

__all__ = ["DOOM", "ActionSpace", "CameraAxis", "KeyGroup", "action_space"]
