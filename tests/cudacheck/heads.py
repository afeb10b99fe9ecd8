"""struct ActionHeads of csrc/cuda/action_heads.cuh, for runs of PTX."""

import ctypes as c

import numpy as np

from rlir.actions import ActionHeads

FACTORS, BUTTONS = 64, 64


class LogitRows(c.Structure):
    _fields_ = [
        ("data", c.c_void_p),
        ("dtype", c.c_int32),
        *((name, c.c_int64) for name in ("trajectory", "frame", "step", "classes")),
    ]


class Heads(c.Structure):
    _fields_ = [
        ("keys", LogitRows),
        ("camera", LogitRows),
        *((name, c.c_int32) for name in ("axes", "groups", "buttons")),
        ("sizes", c.c_int32 * FACTORS),
        ("starts", c.c_int32 * FACTORS),
        *((name, c.c_uint64 * BUTTONS) for name in ("scope", "bit", "code")),
        ("field_shift", c.c_int32 * (FACTORS + 1)),
    ]


def _starts(sizes: tuple[int, ...]) -> list[int]:
    return [sum(sizes[:i]) for i in range(len(sizes))]


def heads_struct(
    heads: ActionHeads,
    keys: np.ndarray,
    camera: np.ndarray,
    dtype: int,
    frames: int,
    widths: tuple[int, int],
) -> Heads:
    """Of contiguous logits [trajectories, frames, width] of a number format."""
    t = heads.tables
    out = Heads()
    for rows, data, width in ((out.keys, keys, widths[0]), (out.camera, camera, widths[1])):
        rows.data, rows.dtype = data.ctypes.data, dtype
        rows.trajectory, rows.frame, rows.step, rows.classes = frames * width, width, 1, width
    out.axes, out.groups = len(t.axis_sizes), len(t.group_sizes)
    out.buttons = len(t.button_classes)
    sizes = (*t.axis_sizes, *t.group_sizes)
    for f, (size, start) in enumerate(
        zip(sizes, _starts(t.axis_sizes) + _starts(t.group_sizes), strict=True)
    ):
        out.sizes[f], out.starts[f] = size, start
    if not out.buttons:
        return out
    shift = 0
    for g, size in enumerate(t.group_sizes):
        out.field_shift[g] = shift
        shift += max(1, (size - 1).bit_length())
    out.field_shift[out.groups] = 64
    starts = _starts(t.group_sizes)
    for b, (place, opponents) in enumerate(zip(t.button_classes, t.button_opponents, strict=True)):
        out.bit[b] = 1
        if place < 0:
            continue
        g = max(i for i, start in enumerate(starts) if start <= place)
        out.bit[b] = 1 << b
        out.scope[b] = 1 << b | opponents
        out.code[b] = (place - starts[g]) << out.field_shift[g]
    return out
