"""A linear layer whose bits a row keeps in any batch, with its gradients.

y = x W^T + b    dx = dy W    dW = dy^T x    db = sum of dy
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rlir import _library
from rlir.errors import InputError
from rlir.tracing import traced

_DTYPES = (torch.float32, torch.bfloat16)


@traced
def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, dtype: torch.dtype | None = None
) -> Tensor:
    """x weight^T + bias over the last dimension.

    The product is one of operands in x's dtype: a weight of another dtype is rounded to it, so
    bfloat16 activations meet float32 master weights as autocast would have it. Sums are float32.

    Args:
        x: [..., K], float32 or bfloat16, with any strides. (float64 and float16 run the reference.)
        weight: [N, K]; bias: [N], added as float32, or None.
        dtype: of the result, float32 or bfloat16: x's if None.

    Returns:
        [..., N], rounded once. On the CPU a row's bits, and those of its gradient, depend on that
        row and the weight alone: not on batch, threads or instruction set. They are those of the
        rollout engine's products. Gradients flow to all three, in their dtypes; in their products
        the operands are again rounded to x's dtype, and the weight's gradient is not.

    Raises:
        InputError: (a ValueError) inputs that do not fit together, in one line.
    """
    dtype = dtype or x.dtype
    _check(x, weight, bias, dtype)
    native = all(kind in _DTYPES for kind in (x.dtype, weight.dtype, dtype))
    if not native or x.device.type != "cpu" or _library.FORCE_REFERENCE:
        return _reference(x, weight, bias, dtype)
    out: Tensor = torch.ops.rlir.linear.default(
        x.reshape(-1, x.shape[-1]) if x.shape[-1] else x.reshape(x.shape[:-1].numel(), 0),
        weight,
        None if bias is None else bias.float().contiguous(),
        to_bfloat16=dtype == torch.bfloat16,
    )
    return out.view(*x.shape[:-1], weight.shape[0])


def linear_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, dtype: torch.dtype | None = None
) -> Tensor:
    """``linear`` in plain PyTorch, on any device, in float64 if x is."""
    dtype = dtype or x.dtype
    _check(x, weight, bias, dtype)
    return _reference(x, weight, bias, dtype)


def linear_gradients(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dweight and the float32 dbias of ``linear``, by the kernels: [N, ...] each."""
    out: tuple[Tensor, Tensor, Tensor] = torch.ops.rlir.linear_backward.default(
        grad, x, weight, need_x=True, need_weight=True, need_bias=True
    )
    return out


def _reference(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    weight = weight.to(x.dtype)
    if x.device.type == "cpu" and x.dtype != torch.float64:
        x, weight = x.float(), weight.float()
    # Elsewhere the library's product in x's dtype serves, and rounds to it.
    return F.linear(x, weight, None if bias is None else bias.to(x.dtype)).to(dtype)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
    if x.dim() == 0:
        raise InputError("linear: x must be [..., K], got shape ()")
    kinds = [("x", x.dtype), ("weight", weight.dtype), ("dtype", dtype)]
    if bias is not None:
        kinds.append(("bias", bias.dtype))
    for name, kind in kinds:
        if not kind.is_floating_point:
            raise InputError(f"linear: {name} must be of floating point, got {kind}")
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise InputError(
            f"linear: weight must be [N, {x.shape[-1]}], got shape {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise InputError(f"linear: bias must be [{weight.shape[0]}], got shape {tuple(bias.shape)}")
    for name, other in (("weight", weight), ("bias", bias)):
        if other is not None and other.device != x.device:
            raise InputError(f"linear: {name} must be on {x.device}, got {other.device}")


if _library.PATH is not None:

    @torch.library.register_fake("rlir::linear")
    def _fake(
        x: Tensor, weight: Tensor, bias: Tensor | None = None, *, to_bfloat16: bool
    ) -> Tensor:
        dtype = torch.bfloat16 if to_bfloat16 else torch.float32
        return x.new_empty(x.shape[0], weight.shape[0], dtype=dtype)

    @torch.library.register_fake("rlir::linear_backward")
    def _fake_backward(
        grad: Tensor, x: Tensor, weight: Tensor, *, need_x: bool, need_weight: bool, need_bias: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        n, k = weight.shape
        return (
            x.new_empty(x.shape[0] if need_x else 0, k),
            weight.new_empty(n if need_weight else 0, k),
            weight.new_empty(n if need_bias else 0, dtype=torch.float32),
        )

    def _save(ctx: Any, inputs: Any, keyword_only_inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs[:2])

    def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = (*ctx.needs_input_grad, False)[:3]
        dx, dw, db = torch.ops.rlir.linear_backward.default(
            grad, x, weight, need_x=need_x, need_weight=need_weight, need_bias=need_bias
        )
        return dx if need_x else None, dw if need_weight else None, db if need_bias else None

    torch.library.register_autograd("rlir::linear", _backward, setup_context=_save)
