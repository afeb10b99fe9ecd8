"""The gate of a SiLU-gated MLP, with its gradients, in one pass each way.

y = silu(gate) * up,  silu(g) = g / (1 + exp(-g))
"""

from typing import Any

import torch
from torch import Tensor

from rlir import _library
from rlir.errors import InputError
from rlir.tracing import traced

_DTYPES = (torch.float32, torch.bfloat16)


@traced
def swiglu(gate: Tensor, up: Tensor | None = None, *, dtype: torch.dtype | None = None) -> Tensor:
    """silu(gate) * up (arXiv 2002.05202, with SiLU as in Llama).

    Args:
        gate: [..., M]; or [..., 2 M] that holds gate and up side by side, as one product gives
            them. float32 or bfloat16, with any strides. (float64 and float16 run the reference.)
        up: [..., M] of gate's dtype, or None.
        dtype: of the result, float32 or bfloat16: gate's if None.

    Returns:
        [..., M]. Arithmetic is float32 with the project's own exp and rounded once, at the end: on
        the CPU the same bits in any batch and on any instruction set, those of the rollout engine.
        Gradients flow to gate and up.

    Raises:
        InputError: (a ValueError) inputs that do not fit together, in one line.
    """
    dtype = dtype or gate.dtype
    _check(gate, up, dtype)
    native = gate.dtype in _DTYPES and dtype in _DTYPES and gate.device.type == "cpu"
    if not native or _library.FORCE_REFERENCE:
        return _reference(gate, up, dtype)
    size = gate.shape[-1] if up is not None else gate.shape[-1] // 2
    out: Tensor = torch.ops.rlir.swiglu.default(
        gate.reshape(-1, gate.shape[-1]),
        None if up is None else up.reshape(-1, size),
        to_bfloat16=dtype == torch.bfloat16,
    )
    return out.view(*gate.shape[:-1], size)


def swiglu_reference(
    gate: Tensor, up: Tensor | None = None, *, dtype: torch.dtype | None = None
) -> Tensor:
    """``swiglu`` in plain PyTorch, on any device, in float64 if gate is."""
    dtype = dtype or gate.dtype
    _check(gate, up, dtype)
    return _reference(gate, up, dtype)


def _reference(gate: Tensor, up: Tensor | None, dtype: torch.dtype) -> Tensor:
    if up is None:
        gate, up = gate.chunk(2, -1)
    wide = torch.float64 if gate.dtype == torch.float64 else torch.float32
    return (torch.nn.functional.silu(gate.to(wide)) * up.to(wide)).to(dtype)


def _check(gate: Tensor, up: Tensor | None, dtype: torch.dtype) -> None:
    if gate.dim() == 0 or gate.shape[-1] == 0:
        raise InputError(
            f"swiglu: gate must be [..., M] with M >= 1, got shape {tuple(gate.shape)}"
        )
    for name, kind in (("gate", gate.dtype), ("dtype", dtype)):
        if not kind.is_floating_point:
            raise InputError(f"swiglu: {name} must be of floating point, got {kind}")
    if up is None:
        if gate.shape[-1] % 2:
            raise InputError(
                f"swiglu: gate must hold two halves of one size where up is None, "
                f"got shape {tuple(gate.shape)}"
            )
        return
    if up.shape != gate.shape or up.dtype != gate.dtype or up.device != gate.device:
        raise InputError(
            f"swiglu: up must be {gate.dtype} of shape {tuple(gate.shape)} on {gate.device}, "
            f"got {up.dtype} of shape {tuple(up.shape)} on {up.device}"
        )


if _library.PATH is not None:

    @torch.library.register_fake("rlir::swiglu")
    def _fake(gate: Tensor, up: Tensor | None = None, *, to_bfloat16: bool) -> Tensor:
        size = gate.shape[1] if up is not None else gate.shape[1] // 2
        dtype = torch.bfloat16 if to_bfloat16 else torch.float32
        return gate.new_empty(gate.shape[0], size, dtype=dtype)

    @torch.library.register_fake("rlir::swiglu_backward")
    def _fake_backward(
        grad: Tensor, gate: Tensor, up: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        rows = 0 if up is None else gate.shape[0]
        return gate.new_empty(gate.shape), gate.new_empty(rows, grad.shape[1])

    def _save(ctx: Any, inputs: Any, keyword_only_inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        gate, *rest = ctx.saved_tensors
        up = rest[0] if rest else None
        dgate, dup = torch.ops.rlir.swiglu_backward.default(grad, gate, up)
        return dgate, None if up is None else dup

    torch.library.register_autograd("rlir::swiglu", _backward, setup_context=_save)
