"""Log-probability of one token a row and the row's entropy, from hidden states, without logits.

logprob_n = z[n, t_n] - log sum_v exp z[n, v],  z = (hidden weight^T + bias) / temperature
"""

import math

import torch
from torch import Tensor

from rlir import _library
from rlir.errors import InputError
from rlir.ops import _selected_logprob  # noqa: F401  registers fakes and gradients
from rlir.ops._support import check_common, input_error, truncated, unpack_support
from rlir.tracing import traced

_OP = "selected_logprob"
_DTYPES = (torch.float32, torch.bfloat16)


@traced
def selected_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    vocab_range: tuple[int, int] | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    support: Tensor | None = None,
    compute_entropy: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """log p(target) and the entropy of each row of softmax(hidden weight^T / temperature).

    The logits [N, V] are in memory neither forward nor backward: a tile at a time is computed,
    reduced, and computed again for the gradients. Accumulation is float32.

    A truncated support is a property of the moment of sampling: pass ``support`` as
    ``sample_tokens`` recorded it, so that a later policy is scored on the tokens that could be
    drawn then. ``top_k`` and ``top_p`` compute the support that this policy would sample from.
    Either way the support is constant in gradients.

    Args:
        hidden: [N, H]; weight: [V, H]. float32 or bfloat16 each, with any strides. (float64
            runs the reference.)
        targets: int64 [N], 0 <= target < V.
        bias: [V], float32 or bfloat16, or None.
        temperature: what logits are divided by, > 0.
        vocab_range: (low, high): only tokens low <= v < high exist.
        top_k, top_p: as in ``sample_tokens``, or None; not with ``support``.
        support: uint8 [N, ceil(V / 8)]: token v is bit v % 8 of byte v // 8. Every row must hold
            a token of ``vocab_range``.
        compute_entropy: False saves its part of the time; the entropy is then None.

    Returns:
        logprob float32 [N], entropy float32 [N] in nats. A target outside of its row's support
        has logprob -inf and no gradient through it (whatever gradient arrives);
        ``outside_support`` counts those. Gradients flow to hidden, weight and bias from either
        output alone, in their own dtypes. On the CPU the bits of a row (forward, and its gradient
        of hidden) depend on the row and the head alone, not on batch or threads, and in float32
        not on the instruction set.

    Raises:
        InputError: (a ValueError) inputs that do not fit together, in one line. On CUDA, where
            looking would wait for the device, a target out of range or a support without a token
            gives NaN and an assertion fails on the device.
    """
    _check(hidden, weight, targets, bias, temperature, vocab_range, top_k, top_p, support)
    if _runs_reference(hidden, weight):
        return _reference(
            hidden,
            weight,
            targets,
            bias,
            temperature,
            vocab_range,
            top_k,
            top_p,
            support,
            compute_entropy,
        )
    low, high = (0, None) if vocab_range is None else vocab_range
    try:
        if top_k is not None or top_p is not None:
            support = torch.ops.rlir.selected_support.default(
                hidden.detach(),
                weight.detach(),
                None if bias is None else bias.detach(),
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                low=low,
                high=high,
            )
        logprob, entropy, _ = torch.ops.rlir.selected_logprob.default(
            hidden,
            weight,
            targets,
            bias,
            support,
            temperature=temperature,
            low=low,
            high=high,
            compute_entropy=compute_entropy,
        )
    except RuntimeError as error:
        raise input_error(_OP, error) from None
    return logprob, entropy if compute_entropy else None


def selected_logprob_reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    vocab_range: tuple[int, int] | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    support: Tensor | None = None,
    compute_entropy: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """``selected_logprob`` in plain PyTorch, with all logits, on any device.

    In float64 if an operand is, in float32 otherwise. What the kernels are held to.
    """
    _check(hidden, weight, targets, bias, temperature, vocab_range, top_k, top_p, support)
    return _reference(
        hidden,
        weight,
        targets,
        bias,
        temperature,
        vocab_range,
        top_k,
        top_p,
        support,
        compute_entropy,
    )


def outside_support(logprob: Tensor) -> Tensor:
    """How many targets were outside of their support: int64 scalar, on the device, not read.

    Of ``selected_logprob``'s first output. Such rows must be left out of a loss: -inf times a
    weight of 0 is NaN.
    """
    return logprob.detach().isneginf().sum()


@traced
def head_logits(hidden: Tensor, weight: Tensor, *, bias: Tensor | None = None) -> Tensor:
    """The logits hidden weight^T + bias with the bits that ``selected_logprob`` has inside.

    For rollouts: ``sample_tokens(head_logits(hidden, weight), ...)`` gives log-probabilities that
    ``selected_logprob`` reproduces bit for bit, in any batch and with any number of threads, as
    long as hidden and weight have the same bits. A product of another library does not.

    Args:
        hidden: [N, H]; weight: [V, H]; bias: [V] or None. As in ``selected_logprob``.

    Returns:
        float32 [N, V]. No gradients: train with ``selected_logprob``.
    """
    hidden, weight = hidden.detach(), weight.detach()
    bias = None if bias is None else bias.detach()
    _check_head("head_logits", hidden, weight, bias)
    if _runs_reference(hidden, weight):
        return head_logits_reference(hidden, weight, bias=bias)
    out: Tensor = torch.ops.rlir.head_logits.default(hidden, weight, bias)
    return out


def head_logits_reference(hidden: Tensor, weight: Tensor, *, bias: Tensor | None = None) -> Tensor:
    """``head_logits`` in plain PyTorch, on any device; differentiable."""
    _check_head("head_logits", hidden, weight, bias)
    dtype = torch.float64 if torch.float64 in (hidden.dtype, weight.dtype) else torch.float32
    logits = hidden.to(dtype) @ weight.to(dtype).t()
    return logits if bias is None else logits + bias.to(dtype)


def _runs_reference(hidden: Tensor, weight: Tensor) -> bool:
    return not _library.has_kernels(hidden) or torch.float64 in (hidden.dtype, weight.dtype)


def _reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: float,
    vocab_range: tuple[int, int] | None,
    top_k: int | None,
    top_p: float | None,
    support: Tensor | None,
    compute_entropy: bool,
) -> tuple[Tensor, Tensor | None]:
    v = weight.shape[0]
    low, high = (0, v) if vocab_range is None else vocab_range
    z = head_logits_reference(hidden, weight, bias=bias) / temperature  # [N, V]
    if not torch.compiler.is_compiling() and len(targets):
        first, last = int(targets.min()), int(targets.max())
        if first < 0 or last >= v:
            wrong = first if first < 0 else last
            raise InputError(f"{_OP}: targets must be from 0 and below {v}, got {wrong}")
    inside = torch.zeros_like(z, dtype=torch.bool)
    inside[:, low:high] = True
    if support is not None:
        inside &= unpack_support(support, v)
        if not torch.compiler.is_compiling() and not inside.any(-1).all():
            row = int(inside.any(-1).int().argmin())
            raise InputError(
                f"{_OP}: support must hold a token of vocab_range in every row, got none in "
                f"row {row}"
            )
    z = z.masked_fill(~inside, -math.inf)
    if top_k is not None or top_p is not None:
        inside = truncated(z.detach(), top_k, top_p)
        z = z.masked_fill(~inside, -math.inf)
    logp = z.log_softmax(-1)
    chosen = inside.gather(1, targets[:, None])[:, 0]
    logprob = torch.where(chosen, logp.gather(1, targets[:, None])[:, 0], -math.inf)
    if not compute_entropy:
        return logprob, None
    return logprob, -(logp.exp() * logp.where(inside, 0)).sum(-1)


def _check_head(op: str, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    named = [("hidden", hidden, 2), ("weight", weight, 2)]
    if bias is not None:
        named.append(("bias", bias, 1))
    for name, x, dims in named:
        if x.dtype not in (*_DTYPES, torch.float64):
            raise InputError(f"{op}: {name} must be float32, bfloat16 or float64, got {x.dtype}")
        if x.dim() != dims:
            shape = "[V]" if dims == 1 else "[N, H]" if name == "hidden" else "[V, H]"
            raise InputError(f"{op}: {name} must be {shape}, got shape {tuple(x.shape)}")
        if x.device != hidden.device:
            raise InputError(f"{op}: {name} must be on {hidden.device}, got {x.device}")
    if weight.shape[1] != hidden.shape[1]:
        raise InputError(
            f"{op}: weight must be [V, {hidden.shape[1]}], got shape {tuple(weight.shape)}"
        )
    if weight.shape[0] < 1:
        raise InputError(f"{op}: weight must have at least one row, got 0")
    if bias is not None and bias.shape[0] != weight.shape[0]:
        raise InputError(f"{op}: bias must be [{weight.shape[0]}], got shape {tuple(bias.shape)}")
    if bias is not None and bias.dtype == torch.float64 and not _runs_reference(hidden, weight):
        raise InputError(f"{op}: bias must be float32 or bfloat16, got {bias.dtype}")


def _check(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: float,
    vocab_range: tuple[int, int] | None,
    top_k: int | None,
    top_p: float | None,
    support: Tensor | None,
) -> None:
    _check_head(_OP, hidden, weight, bias)
    n, v = hidden.shape[0], weight.shape[0]
    check_common(_OP, v, temperature, vocab_range, top_k, top_p)
    if targets.dtype != torch.int64:
        raise InputError(f"{_OP}: targets must be torch.int64, got {targets.dtype}")
    if targets.shape != (n,):
        raise InputError(f"{_OP}: targets must be [{n}], got shape {tuple(targets.shape)}")
    if targets.device != hidden.device:
        raise InputError(f"{_OP}: targets must be on {hidden.device}, got {targets.device}")
    if support is None:
        return
    if top_k is not None or top_p is not None:
        name = "top_p" if top_k is None else "top_k"
        raise InputError(f"{_OP}: support must come without top_k and top_p, got {name}")
    if support.dtype != torch.uint8:
        raise InputError(f"{_OP}: support must be torch.uint8, got {support.dtype}")
    if support.shape != (n, (v + 7) // 8):
        raise InputError(
            f"{_OP}: support must be [{n}, {(v + 7) // 8}], got shape {tuple(support.shape)}"
        )
    if support.device != hidden.device:
        raise InputError(f"{_OP}: support must be on {hidden.device}, got {support.device}")
