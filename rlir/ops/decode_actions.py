"""Actions off the heads of an inverse dynamics model: classes of factors, and degrees.

a_f = argmax of head f, where keys that exclude one another cancel out
"""

import math

import torch
from torch import Tensor

from rlir import _library
from rlir.actions.heads import ActionHeads
from rlir.actions.space import ActionSpace
from rlir.ops._action_heads import Actions, heads_of, read, rows
from rlir.tracing import traced


@traced
def decode_actions(
    button_logits: Tensor | None,
    camera_logits: Tensor | None,
    space: ActionSpace | ActionHeads,
) -> Actions:
    """What an inverse dynamics model reads: the class of every factor, and the camera in degrees.

    A camera axis has the class of its largest logit. So has a key group, if the heads are class
    vectors. Of two-way buttons, one is held where its second logit is larger than its first; it
    counts if no key that it excludes is held (the other keys of its group, the space's
    ``conflicts``), as MineWorld releases such pairs; a group in which no key counts has class 0.
    Of equal largest logits the first wins: two equal logits of a button are "not held".

    Args:
        button_logits: [..., classes of all key groups], or, if the heads have buttons,
            [..., 2 buttons] or, of several, [..., buttons, 2]. None if the space has no keys.
            float64, float32, bfloat16 or float16, with any strides.
        camera_logits: [..., bins of all axes], or, of several axes with as many bins each,
            [..., axes, bins]. None if the space has no axes. Its dtype may be another.
        space: an action space, whose factors then have one class vector each, or ``ActionHeads``
            (``rlir.actions.MINECRAFT_VPT`` for VPT's IDM).

    Returns:
        ``Actions(classes, degrees)``: int64 [..., factors], camera axes first, in the *heads'*
        bins and the space's key classes; float32 [..., axes], the centres of the bins. A factor
        one of whose logits is NaN or infinite has class -1 and NaN degrees; for buttons, which
        cancel one another out, so do all key groups of that frame. No gradient flows back.

    Raises:
        InputError: (a ValueError) inputs that do not fit together, in one line.
    """
    heads = heads_of(space)
    keys, camera, shape = rows("decode_actions", button_logits, camera_logits, heads)
    if not _library.has_kernels(keys):
        return _reference(keys, camera, heads)
    tables = heads.tables
    n = math.prod(shape)
    classes, degrees = torch.ops.rlir.decode_actions.default(
        keys.detach().reshape(n, 1, keys.shape[-1]) if keys.dim() != 3 else keys.detach(),
        camera.detach().reshape(n, 1, camera.shape[-1]) if camera.dim() != 3 else camera.detach(),
        axis_sizes=tables.axis_sizes,
        group_sizes=tables.group_sizes,
        button_classes=tables.button_classes,
        button_opponents=tables.button_opponents,
        centres=tables.centres,
    )
    if keys.dim() == 3:
        return Actions(classes, degrees)
    return Actions(
        classes.view(*shape, len(heads.sizes)), degrees.view(*shape, len(tables.axis_sizes))
    )


def decode_actions_reference(
    button_logits: Tensor | None,
    camera_logits: Tensor | None,
    space: ActionSpace | ActionHeads,
) -> Actions:
    """``decode_actions`` in plain PyTorch, on any device: what the kernels are held to."""
    heads = heads_of(space)
    keys, camera, _ = rows("decode_actions", button_logits, camera_logits, heads)
    return _reference(keys, camera, heads)


def _reference(keys: Tensor, camera: Tensor, heads: ActionHeads) -> Actions:
    classes = read(keys, camera, heads)
    degrees = torch.empty((*classes.shape[:-1], len(heads.axes)), device=keys.device)
    for i, axis in enumerate(heads.axes):
        centres = torch.tensor([*axis.centres().tolist(), math.nan], device=keys.device)
        degrees[..., i] = centres[classes[..., i]]  # class -1 is the last: NaN
    return Actions(classes, degrees)


if _library.PATH is not None:

    @torch.library.register_fake("rlir::decode_actions")
    def _fake(
        button_logits: Tensor,
        camera_logits: Tensor,
        *,
        axis_sizes: list[int],
        group_sizes: list[int],
        button_classes: list[int],
        button_opponents: list[int],
        centres: list[float],
    ) -> tuple[Tensor, Tensor]:
        shape, axes = button_logits.shape[:2], len(axis_sizes)
        return (
            button_logits.new_empty((*shape, axes + len(group_sizes)), dtype=torch.int64),
            button_logits.new_empty((*shape, axes), dtype=torch.float32),
        )
