"""Rows of a table, with a gradient whose order of sums is fixed.

out[n] = weight[ids[n]]    dweight[v] = sum of dy[n] over n with ids[n] = v
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rlir import _library
from rlir.errors import InputError
from rlir.ops._support import input_error
from rlir.tracing import traced

_OP = "embedding"
_DTYPES = (torch.float32, torch.bfloat16)


@traced
def embedding(ids: Tensor, weight: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """weight[ids].

    Args:
        ids: integers [...], 0 <= id < V.
        weight: [V, D], float32 or bfloat16, with any strides. (Others run the reference.)
        dtype: of the result, float32 or bfloat16: the weight's if None.

    Returns:
        [..., D]. The gradient is dense, in the weight's dtype: on the CPU a float32 sum over equal
        ids in the order of rows, whatever the threads and the instruction set.

    Raises:
        InputError: (a ValueError) inputs that do not fit together, in one line. On CUDA, where
            looking would wait for the device, an id out of range fails an assertion there.
    """
    dtype = dtype or weight.dtype
    _check(ids, weight, dtype)
    native = weight.dtype in _DTYPES and dtype in _DTYPES and weight.device.type == "cpu"
    if not native or _library.FORCE_REFERENCE:
        return _reference(ids, weight, dtype)
    try:
        out: Tensor = torch.ops.rlir.embedding.default(
            ids.reshape(-1).long().contiguous(), weight, to_bfloat16=dtype == torch.bfloat16
        )
    except RuntimeError as error:
        raise input_error(_OP, error) from None
    return out.view(*ids.shape, weight.shape[1])


def embedding_reference(ids: Tensor, weight: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """``embedding`` in plain PyTorch, on any device and in any dtype."""
    dtype = dtype or weight.dtype
    _check(ids, weight, dtype)
    return _reference(ids, weight, dtype)


def _reference(ids: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    looks = weight.device.type == "cpu" and not torch.compiler.is_compiling()
    if looks and ids.numel():
        first, last = int(ids.min()), int(ids.max())
        if first < 0 or last >= len(weight):
            wrong = first if first < 0 else last
            raise InputError(f"{_OP}: ids must be from 0 and below {len(weight)}, got {wrong}")
    return F.embedding(ids.long(), weight).to(dtype)


def _check(ids: Tensor, weight: Tensor, dtype: torch.dtype) -> None:
    if ids.dtype.is_floating_point or ids.dtype.is_complex or ids.dtype == torch.bool:
        raise InputError(f"{_OP}: ids must be integers, got {ids.dtype}")
    for name, kind in (("weight", weight.dtype), ("dtype", dtype)):
        if not kind.is_floating_point:
            raise InputError(f"{_OP}: {name} must be of floating point, got {kind}")
    if weight.dim() != 2:
        raise InputError(f"{_OP}: weight must be [V, D], got shape {tuple(weight.shape)}")
    if ids.device != weight.device:
        raise InputError(f"{_OP}: ids must be on {weight.device}, got {ids.device}")


if _library.PATH is not None:

    @torch.library.register_fake("rlir::embedding")
    def _fake(ids: Tensor, weight: Tensor, *, to_bfloat16: bool) -> Tensor:
        dtype = torch.bfloat16 if to_bfloat16 else torch.float32
        return weight.new_empty(ids.shape[0], weight.shape[1], dtype=dtype)

    @torch.library.register_fake("rlir::embedding_backward")
    def _fake_backward(grad: Tensor, ids: Tensor, weight: Tensor) -> Tensor:
        return weight.new_empty(weight.shape)

    def _save(ctx: Any, inputs: Any, keyword_only_inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    def _backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor | None]:
        ids, weight = ctx.saved_tensors
        if not ctx.needs_input_grad[1]:
            return None, None
        return None, torch.ops.rlir.embedding_backward.default(grad, ids, weight)

    torch.library.register_autograd("rlir::embedding", _backward, setup_context=_save)
