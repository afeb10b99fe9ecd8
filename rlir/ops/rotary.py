"""Rotary position embedding with its gradient, in the rollout engine's bits.

y_i = x_i cos_i - x_j sin_i,  y_j = x_j cos_j + x_i sin_j  for the pair (i, j) = (i, i + D/2)
"""

from typing import Any

import torch
from torch import Tensor

from rlir import _library
from rlir.errors import InputError
from rlir.tracing import traced

_DTYPES = (torch.float32, torch.bfloat16)


@traced
def rotary(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """Turn pairs of each head by their position's angles (arXiv 2104.09864).

    Args:
        x: [B, T, H, D], D even, float32 or bfloat16, with any strides. (float64 and float16 run the
            reference.)
        cos, sin: [T, D] or [B, T, D]: of the position of each token; constant, no gradient flows
            to them.
        interleaved: pairs are (2i, 2i + 1) in place of (i, i + D/2).

    Returns:
        [B, T, H, D] in x's dtype. float32 arithmetic, rounded once at the end. Bits do not depend
        on batch, threads or instruction set; ``rotary_append_`` gives the same.

    Raises:
        InputError: (a ValueError) inputs that do not fit together, in one line.
    """
    _check(x, cos, sin)
    if x.dtype not in _DTYPES or x.device.type != "cpu" or _library.FORCE_REFERENCE:
        return rotate(x, cos, sin, interleaved)
    tables = [table.detach().float().contiguous() for table in (cos, sin)]
    out: Tensor = torch.ops.rlir.rotary.default(x, *tables, interleaved, False)
    return out


def rotary_reference(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """``rotary`` in plain PyTorch, on any device, in float64 if x is."""
    _check(x, cos, sin)
    return rotate(x, cos, sin, interleaved)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x [B, T, H, D] turned by cos and sin [T, D] or [B, T, D]."""
    wide = x if x.dtype == torch.float64 else x.float()
    cos, sin = (table.detach().to(wide.dtype).unsqueeze(-2) for table in (cos, sin))
    if interleaved:
        turned = torch.stack([-wide[..., 1::2], wide[..., ::2]], -1).flatten(-2)
    else:
        half = x.shape[-1] // 2
        turned = torch.cat([-wide[..., half:], wide[..., :half]], -1)
    return (wide * cos + turned * sin).to(x.dtype)


def check_rotated(op: str, name: str, x: Tensor) -> None:
    if x.dim() != 4 or x.shape[3] < 2 or x.shape[3] % 2:
        raise InputError(
            f"{op}: {name} must be [B, T, H, D] with D even, got shape {tuple(x.shape)}"
        )
    if not x.dtype.is_floating_point:
        raise InputError(f"{op}: {name} must be of floating point, got {x.dtype}")


def check_table(
    op: str, name: str, table: Tensor, shapes: tuple[tuple[int, ...], ...], device: torch.device
) -> None:
    if tuple(table.shape) not in shapes:
        allowed = " or ".join(str(list(shape)) for shape in shapes)
        raise InputError(f"{op}: {name} must be {allowed}, got shape {tuple(table.shape)}")
    if not table.dtype.is_floating_point:
        raise InputError(f"{op}: {name} must be of floating point, got {table.dtype}")
    if table.device != device:
        raise InputError(f"{op}: {name} must be on {device}, got {table.device}")


def _check(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    check_rotated("rotary", "x", x)
    b, t, _, d = x.shape
    check_table("rotary", "cos", cos, ((t, d), (b, t, d)), x.device)
    check_table("rotary", "sin", sin, (tuple(cos.shape),), x.device)


if _library.PATH is not None:

    @torch.library.register_fake("rlir::rotary")
    def _fake(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, transposed: bool) -> Tensor:
        return x.new_empty(x.shape)

    def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, cos, sin, *ctx.options = inputs
        ctx.save_for_backward(cos, sin)

    def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        interleaved, transposed = ctx.options
        dx = torch.ops.rlir.rotary.default(grad, *ctx.saved_tensors, interleaved, not transposed)
        return dx, None, None, None, None

    torch.library.register_autograd("rlir::rotary", _backward, setup_context=_save)
