"""What the tests of decode_actions and inverse_reward share: heads, inputs, a reading by hand.

Run as a program with a number of threads, this file prints digests of the kernels' bits; the tests
run it under every instruction set.
"""

import hashlib
import json
import math
import sys

import numpy as np
import torch
from torch import Tensor

from rlir import _build_info
from rlir.actions import (
    DOOM,
    MINECRAFT,
    MINECRAFT_VPT,
    ActionHeads,
    ActionSpace,
    CameraAxis,
    KeyGroup,
)
from rlir.ops import Actions, decode_actions, inverse_reward

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_KEYS = tuple(f"k{i}" for i in range(63))
MANY = ActionSpace(
    "many",
    (),
    (KeyGroup("all", _KEYS[:31]), *(KeyGroup(k, (k,)) for k in _KEYS[31:])),
    (("k0", "k40"), ("k40", "k62")),
)
WIDE = ActionSpace("wide", (CameraAxis("yaw", "dx", 30.0, 5.0, 37),), DOOM.groups)
CAMERA_ONLY = ActionSpace("camera", MINECRAFT.axes, ())
HEADS = {
    "doom": ActionHeads(DOOM, DOOM.axes),
    "minecraft": ActionHeads(MINECRAFT, MINECRAFT.axes),
    "vpt": MINECRAFT_VPT,
    "many": ActionHeads(MANY, (), _KEYS[::-1]),
    "wide": ActionHeads(WIDE, WIDE.axes, ("mouse.0",)),
    "camera": ActionHeads(CAMERA_ONLY, MINECRAFT_VPT.axes),
}


def logits_of(
    heads: ActionHeads, *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor | None, Tensor | None]:
    """Random logits, coarse enough for ties."""
    g = torch.Generator().manual_seed(seed)

    def draw(*sizes: int) -> Tensor:
        return (torch.randn(*shape, *sizes, generator=g) * 4).round().div(2).to(dtype)

    bins, classes = sum(heads.tables.axis_sizes), sum(heads.tables.group_sizes)
    keys = draw(classes) if heads.buttons is None else draw(2 * len(heads.buttons))
    return keys if classes else None, draw(bins) if bins else None


def commands_of(heads: ActionHeads, *shape: int, seed: int = 1) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    sizes = heads.space.factor_sizes
    return torch.stack([torch.randint(n, shape, generator=g) for n in sizes], -1)


def read_by_hand(keys: Tensor | None, camera: Tensor | None, heads: ActionHeads) -> Tensor:
    """The classes of one frame's logits in plain Python, -1 where they cannot be read."""
    out = []

    def largest(x: list[float]) -> int:
        return x.index(max(x)) if all(map(math.isfinite, x)) else -1

    rest = [] if camera is None else camera.double().tolist()
    for size in heads.tables.axis_sizes:
        out.append(largest(rest[:size]))
        rest = rest[size:]
    rest = [] if keys is None else keys.double().tolist()
    if heads.buttons is None:
        for size in heads.tables.group_sizes:
            out.append(largest(rest[:size]))
            rest = rest[size:]
    elif all(map(math.isfinite, rest)):
        pressed = {k for i, k in enumerate(heads.buttons) if rest[2 * i + 1] > rest[2 * i]}
        out += heads.space.encode_keys(pressed)
    else:
        out += [-1] * len(heads.space.groups)
    return torch.tensor(out)


def wanted_by_hand(command: Tensor, heads: ActionHeads) -> Tensor:
    """The heads' classes that a command asks for."""
    out = command.clone()
    for f, (axis, head) in enumerate(zip(heads.space.axes, heads.axes, strict=True)):
        out[f] = int(head.encode(np.array(axis.centres()[int(command[f])])))
    for f, group in enumerate(heads.space.groups, len(heads.axes)):
        key = group.keys[int(command[f]) - 1] if command[f] else None
        if heads.buttons is not None and key not in heads.buttons:
            out[f] = 0
    return out


def digests() -> dict[str, str]:
    found = {}
    for name, heads in HEADS.items():
        for dtype in DTYPES:
            digest = hashlib.sha256()
            for b, t in ((300, 16), (7, 131), (1000, 1)):
                keys, camera = logits_of(heads, b, t, dtype=dtype, seed=b)
                first = camera if keys is None else keys
                assert first is not None
                first[b // 2, t // 2] = torch.nan
                mask = torch.rand(b, t, generator=torch.Generator().manual_seed(t)) < 0.8
                actions = decode_actions(keys, camera, heads)
                commands = commands_of(heads, b, t)
                weights = [0.3 * (f + 1) for f in range(commands.shape[-1])]
                turned = torch.linspace(-20, 20, b * t * len(heads.axes)).view(b, t, -1)
                for out in (
                    *actions,
                    *inverse_reward(keys, camera, commands, heads, weights=weights),
                    *inverse_reward(keys, camera, Actions(commands, turned), heads, mode="joint"),
                    *inverse_reward(keys, camera, commands, heads, frame_mask=mask),
                ):
                    digest.update(out.contiguous().flatten().view(torch.uint8).numpy().tobytes())
            found[f"{name} {dtype}"] = digest.hexdigest()
    return found


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[1]))
    print(json.dumps({**digests(), "isa": _build_info.used_cpu_isa()}))
