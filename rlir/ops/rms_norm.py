"""Root mean square normalisation whose bits a row keeps in any batch, with its gradients.

y = x / sqrt(mean(x^2) + eps) * weight
"""

import math
from typing import Any

import torch
from torch import Tensor

from rlir import _library
from rlir.errors import InputError
from rlir.tracing import traced

_DTYPES = (torch.float32, torch.bfloat16)


@traced
def rms_norm(
    x: Tensor, weight: Tensor, eps: float = 1e-5, *, dtype: torch.dtype | None = None
) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (arXiv 1910.07467).

    Args:
        x: [..., D], float32 or bfloat16, with any strides. (float64 and float16 run the reference.)
        weight: [D].
        eps: added to the mean of squares, >= 0.
        dtype: of the result, float32 or bfloat16: x's if None.

    Returns:
        [..., D]. Arithmetic is float32 and rounded once, at the end. On the CPU a row's bits, and
        those of its gradient, depend on that row alone: not on batch, threads or instruction set.
        They are those of the rollout engine. Gradients flow to x and weight, in their dtypes.

    Raises:
        InputError: (a ValueError) inputs that do not fit together, in one line.
    """
    dtype = dtype or x.dtype
    _check(x, weight, eps, dtype)
    native = x.dtype in _DTYPES and dtype in _DTYPES and x.device.type == "cpu"
    if not native or _library.FORCE_REFERENCE:
        return _reference(x, weight, eps, dtype)
    out, _ = torch.ops.rlir.rms_norm.default(
        x.reshape(-1, x.shape[-1]),
        weight.float().contiguous(),
        eps=eps,
        to_bfloat16=dtype == torch.bfloat16,
    )
    return out.view(x.shape)


def rms_norm_reference(
    x: Tensor, weight: Tensor, eps: float = 1e-5, *, dtype: torch.dtype | None = None
) -> Tensor:
    """``rms_norm`` in plain PyTorch, on any device, in float64 if x is."""
    dtype = dtype or x.dtype
    _check(x, weight, eps, dtype)
    return _reference(x, weight, eps, dtype)


def _reference(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    wide = x if x.dtype == torch.float64 else x.float()
    scale = (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    return (wide * scale * weight.to(wide.dtype)).to(dtype)


def _check(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> None:
    if x.dim() == 0 or x.shape[-1] == 0:
        raise InputError(f"rms_norm: x must be [..., D] with D >= 1, got shape {tuple(x.shape)}")
    for name, kind in (("x", x.dtype), ("weight", weight.dtype), ("dtype", dtype)):
        if not kind.is_floating_point:
            raise InputError(f"rms_norm: {name} must be of floating point, got {kind}")
    if weight.shape != x.shape[-1:]:
        raise InputError(
            f"rms_norm: weight must be [{x.shape[-1]}], got shape {tuple(weight.shape)}"
        )
    if weight.device != x.device:
        raise InputError(f"rms_norm: weight must be on {x.device}, got {weight.device}")
    if not 0 <= eps < math.inf:
        raise InputError(f"rms_norm: eps must be finite and >= 0, got {eps}")


if _library.PATH is not None:

    @torch.library.register_fake("rlir::rms_norm")
    def _fake(x: Tensor, weight: Tensor, *, eps: float, to_bfloat16: bool) -> tuple[Tensor, Tensor]:
        dtype = torch.bfloat16 if to_bfloat16 else torch.float32
        return x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape[0], dtype=torch.float32)

    @torch.library.register_fake("rlir::rms_norm_backward")
    def _fake_backward(
        grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor, *, need_x: bool, need_weight: bool
    ) -> tuple[Tensor, Tensor]:
        rows = x.shape[0] if need_x else 0
        return x.new_empty(rows, x.shape[1]), weight.new_empty(x.shape[1] if need_weight else 0)

    def _save(ctx: Any, inputs: Any, keyword_only_inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs, output[1])
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    def _backward(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Tensor | None, Tensor | None]:
        x, weight, scale = ctx.saved_tensors
        need_x, need_weight = ctx.needs_input_grad[:2]
        if grad is None:
            return None, None
        dx, dw = torch.ops.rlir.rms_norm_backward.default(
            grad, x, weight, scale, need_x=need_x, need_weight=need_weight
        )
        return dx if need_x else None, dw if need_weight else None

    torch.library.register_autograd("rlir::rms_norm", _backward, setup_context=_save)
