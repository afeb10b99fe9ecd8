"""Log-probability and entropy of chosen tokens, for the other modules of this package."""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rlir import ops

CHUNK = 512  # rows whose logits the plain path holds at a time


def selected(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    compute_entropy: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """log softmax(hidden weight^T + bias, / temperature)[targets] and the entropy of each row.

    hidden [N, H], weight [V, H], targets [N]; results [N]. By ``rlir.ops.selected_logprob`` where
    it is built, otherwise in plain PyTorch, a chunk of rows at a time.
    """
    fused = getattr(ops, "selected_logprob", None)
    if fused is not None:
        logprob, entropy = fused(
            hidden,
            weight,
            targets,
            bias=bias,
            temperature=temperature,
            compute_entropy=compute_entropy,
        )
        return logprob, entropy if compute_entropy else None
    return selected_plain(
        hidden,
        weight,
        targets,
        bias=bias,
        temperature=temperature,
        compute_entropy=compute_entropy,
    )


def selected_plain(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    compute_entropy: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """The same in plain PyTorch; the backward pass computes a chunk's logits again."""

    def rows(h: Tensor, w: Tensor, b: Tensor | None, t: Tensor) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(h.dtype, w.dtype)
        logits = torch.nn.functional.linear(h.to(dtype), w.to(dtype), b)
        logits = logits.to(torch.promote_types(dtype, torch.float32)) / temperature
        total = logits.logsumexp(-1)
        logprob = logits.gather(-1, t[:, None])[:, 0] - total
        if not compute_entropy:
            return logprob, logprob
        return logprob, total - (logits.softmax(-1) * logits).sum(-1)

    parts = []
    for begin in range(0, max(len(targets), 1), CHUNK):
        part = slice(begin, begin + CHUNK)
        parts.append(
            checkpoint(rows, hidden[part], weight, bias, targets[part], use_reentrant=False)
        )
    logprob, entropy = (torch.cat(x) for x in zip(*parts, strict=True))
    return logprob, entropy if compute_entropy else None


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
