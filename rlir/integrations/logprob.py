"""Log-probability of chosen tokens where a trainer has the logits already."""

import torch
from torch import Tensor

CHUNK = 512  # rows that are in float32 at a time


class _FromLogits(torch.autograd.Function):
    """Keeps logits and one number a row for the backward pass, not a second [..., V]."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, logits: Tensor, labels: Tensor, scale: float
    ) -> Tensor:
        wide = torch.promote_types(logits.dtype, torch.float32)
        rows, index = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
        total = torch.cat(
            [(part.to(wide) * scale).logsumexp(-1) for part in rows.split(CHUNK)]
            or [rows.new_empty(0, dtype=wide)]
        )
        ctx.save_for_backward(logits, index, total)
        ctx.scale = scale  # type: ignore[attr-defined]
        chosen = rows.gather(-1, index[:, None])[:, 0].to(wide) * scale
        return (chosen - total).reshape(labels.shape)

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, grad: Tensor
    ) -> tuple[Tensor, None, None]:
        logits, index, total = ctx.saved_tensors  # type: ignore[attr-defined]
        scale: float = ctx.scale  # type: ignore[attr-defined]
        rows, flat = logits.reshape(-1, logits.shape[-1]), grad.reshape(-1, 1) * scale
        out = torch.empty_like(rows, memory_format=torch.contiguous_format)
        for begin in range(0, len(rows), CHUNK):
            part = slice(begin, begin + CHUNK)
            probability = (rows[part].to(total.dtype) * scale - total[part, None]).exp()
            d = probability * -flat[part]
            out[part] = d.scatter_add_(-1, index[part, None], flat[part])
        return out.reshape(logits.shape), None, None


def from_logits(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature)[labels], in float32 or better.

    logits [..., V], labels [...] int64. Neither is changed. Beyond the logits themselves it holds
    one row chunk in float32 and one number a row, forward and backward.
    """
    return _FromLogits.apply(logits, labels, 1.0 / temperature)
