"""One token a row from truncated logits, with its log-probability on the true support.

token ~ softmax(logits / temperature) restricted to the support, renormalised there.
"""

import math

import torch
from torch import Tensor

from rlir import _library
from rlir.errors import InputError
from rlir.ops._noise import draw_uniform
from rlir.ops._support import check_common, input_error, pack_support, truncated
from rlir.tracing import traced

_DTYPES = (torch.float32, torch.bfloat16)


@traced
def sample_tokens(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    vocab_range: tuple[int, int] | None = None,
    seed: int | Tensor,
    offset: int | Tensor,
    row_ids: Tensor | None = None,
    return_support: bool = False,
) -> tuple[Tensor, ...]:
    """Draw a token a row; log-probability and entropy are those of what it was drawn from.

    The support of a row is ``vocab_range``; of it, the ``top_k`` largest logits; of those, the
    smallest set of the most likely tokens that has ``top_p`` of their mass; of those, the tokens
    with at least ``min_p`` of the largest probability. Among equal logits the lower token is the
    more likely one. The random number of a row is Philox 4x32-10 of (seed, offset, row id): a row
    draws the same token in any batch.

    Args:
        logits: [N, V], float32 or bfloat16, with any strides. V <= 2^21.
        temperature: what logits are divided by, > 0.
        top_k, top_p, min_p: truncation, or None.
        vocab_range: (low, high): only tokens low <= v < high.
        seed: int, or an int64 tensor with one element (so that a captured graph draws anew).
        offset: likewise, below 2^32; the number of the draw: position in the sequence, step.
        row_ids: int64 [N], who a row is, whatever batch it is in; 0, 1, ... if None.
        return_support: also return the support.

    Returns:
        token int64 [N], logprob float32 [N], entropy float32 [N] in nats, and with
        ``return_support`` the support, uint8 [N, ceil(V / 8)]: token v is bit v % 8 of byte
        v // 8 (``unpack_support`` gives a bool mask, ``selected_logprob`` takes it as it is).
        No gradients. All bits depend on the row, its id, seed and offset alone; the CUDA kernel
        is written to give those of the CPU. On the CPU logprob has the bits of
        ``selected_logprob`` where that computes the same logits (``head_logits``).

    Raises:
        InputError: (a ValueError) inputs that do not fit together, or a row with NaN, with
            +infinity, or with nothing finite in ``vocab_range``. On CUDA, where looking would wait
            for the device, such a row gets NaN and an assertion fails on the device.
    """
    logits = logits.detach()
    _check(logits, temperature, top_k, top_p, min_p, vocab_range, seed, offset, row_ids)
    if not _library.has_kernels(logits):
        out = _reference(
            logits, temperature, top_k, top_p, min_p, vocab_range, seed, offset, row_ids
        )
    else:
        low, high = (0, None) if vocab_range is None else vocab_range
        try:
            out = torch.ops.rlir.sample_tokens.default(
                logits,
                row_ids,
                seed if isinstance(seed, Tensor) else None,
                offset if isinstance(offset, Tensor) else None,
                seed=0 if isinstance(seed, Tensor) else seed,
                offset=0 if isinstance(offset, Tensor) else offset,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                min_p=min_p,
                low=low,
                high=high,
                return_support=return_support,
            )
        except RuntimeError as error:
            raise input_error("sample_tokens", error) from None
    return tuple(out) if return_support else tuple(out[:3])


def sample_tokens_reference(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    vocab_range: tuple[int, int] | None = None,
    seed: int | Tensor,
    offset: int | Tensor,
    row_ids: Tensor | None = None,
    return_support: bool = False,
) -> tuple[Tensor, ...]:
    """``sample_tokens`` in plain PyTorch, on any device: sorts, and draws with the same numbers.

    float64 logits are worked on, and the results returned, in float64; all others in float32.
    """
    logits = logits.detach()
    _check(logits, temperature, top_k, top_p, min_p, vocab_range, seed, offset, row_ids)
    out = _reference(logits, temperature, top_k, top_p, min_p, vocab_range, seed, offset, row_ids)
    return out if return_support else out[:3]


def _reference(
    logits: Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    vocab_range: tuple[int, int] | None,
    seed: int | Tensor,
    offset: int | Tensor,
    row_ids: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n, v = logits.shape
    low, high = (0, v) if vocab_range is None else vocab_range
    z = logits.float() / temperature
    outside = torch.ones(v, dtype=torch.bool, device=z.device)
    outside[low:high] = False
    z = z.masked_fill(outside, -math.inf)
    if not torch.compiler.is_compiling() and n:
        bad = ~z.amax(-1).isfinite()
        if bad.any():
            raise InputError(
                "sample_tokens: logits must have a finite largest value in vocab_range and no "
                f"NaN, got otherwise in row {int(bad.int().argmax())}"
            )
    inside = truncated(z, top_k, top_p, min_p)
    z = z.masked_fill(~inside, -math.inf)
    logp = z.log_softmax(-1)
    entropy = -(logp.exp() * logp.where(inside, 0)).sum(-1)
    # Masses as the kernels have them: multiples of 2^-32 of the largest.
    mass = ((z - z.amax(-1, keepdim=True)).exp().double() * 2.0**32).round()
    cumulative = mass.cumsum(-1)
    rows = torch.arange(n, device=z.device) if row_ids is None else row_ids
    uniform = draw_uniform(seed, offset, rows)
    target = (uniform[:, None] * cumulative[:, -1:]).floor()
    token = torch.searchsorted(cumulative, target, right=True).clamp(max=v - 1)
    return token[:, 0], logp.gather(1, token)[:, 0], entropy, pack_support(inside)


def _check(
    logits: Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    vocab_range: tuple[int, int] | None,
    seed: int | Tensor,
    offset: int | Tensor,
    row_ids: Tensor | None,
) -> None:
    op = "sample_tokens"
    if logits.dtype not in _DTYPES:
        raise InputError(f"{op}: logits must be float32 or bfloat16, got {logits.dtype}")
    if logits.dim() != 2:
        raise InputError(f"{op}: logits must be [N, V], got shape {tuple(logits.shape)}")
    check_common(op, logits.shape[1], temperature, vocab_range, top_k, top_p)
    if min_p is not None and not 0 <= min_p <= 1:
        raise InputError(f"{op}: min_p must be in [0, 1] or None, got {min_p}")
    for name, value in (("seed", seed), ("offset", offset)):
        if isinstance(value, Tensor):
            if value.dtype != torch.int64 or value.numel() != 1:
                raise InputError(
                    f"{op}: {name} must be an int or an int64 tensor of one element, "
                    f"got {value.dtype} of {value.numel()}"
                )
            if value.device != logits.device:
                raise InputError(f"{op}: {name} must be on {logits.device}, got {value.device}")
        else:
            bits = 63 if name == "seed" else 32
            if not 0 <= value < 2**bits:
                raise InputError(f"{op}: {name} must be from 0 and below 2^{bits}, got {value}")
    if row_ids is None:
        return
    if row_ids.dtype != torch.int64:
        raise InputError(f"{op}: row_ids must be torch.int64, got {row_ids.dtype}")
    if row_ids.shape != logits.shape[:1]:
        raise InputError(
            f"{op}: row_ids must be [{logits.shape[0]}], got shape {tuple(row_ids.shape)}"
        )
    if row_ids.device != logits.device:
        raise InputError(f"{op}: row_ids must be on {logits.device}, got {row_ids.device}")


if _library.PATH is not None:

    @torch.library.register_fake("rlir::sample_tokens")
    def _fake(
        logits: Tensor,
        row_ids: Tensor | None = None,
        seed_tensor: Tensor | None = None,
        offset_tensor: Tensor | None = None,
        *,
        seed: int = 0,
        offset: int = 0,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        low: int = 0,
        high: int | None = None,
        return_support: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        n, v = logits.shape
        return (
            logits.new_empty(n, dtype=torch.int64),
            logits.new_empty(n, dtype=torch.float32),
            logits.new_empty(n, dtype=torch.float32),
            logits.new_empty(n if return_support else 0, (v + 7) // 8, dtype=torch.uint8),
        )
