"""Rotary embedding and cache write of a step's tokens in one pass.

q'_n = rotate(q_n, p),  cache_k[b, p] = rotate(k_n, p),  cache_v[b, p] = v_n,  p = positions_n
"""

import torch
from torch import Tensor

from rlir import _library
from rlir.errors import InputError
from rlir.ops._support import input_error
from rlir.ops.rotary import check_rotated, check_table, rotate
from rlir.tracing import traced

_OP = "rotary_append_"
_DTYPES = (torch.float32, torch.bfloat16)


@traced
def rotary_append_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    cache_k: Tensor,
    cache_v: Tensor,
    positions: Tensor,
    *,
    interleaved: bool = False,
) -> Tensor:
    """Turn queries and keys by their positions' angles; write keys and values to their slots.

    Args:
        q: [B, T, Hq, D], D even; k, v: [B, T, Hkv, D]. float32 or bfloat16 alike, with any strides.
            (float64 and float16 run the reference.)
        cos, sin: [P, D]: of every position.
        cache_k, cache_v: [B, capacity, Hkv, D] in q's dtype, or bfloat16 where q is float32: what
            is written is rounded once then, after the rotation. Contiguous in D; written in place.
        positions: int64 [B, T]: a token's slot and its position, below capacity and P, different
            within a row.
        interleaved: as in ``rotary``.

    Returns:
        The rotated queries, [B, T, Hq, D] in the caches' dtype; with the keys they have the bits of
        ``rotary``, rounded to that dtype. No gradients.

    Raises:
        InputError: (a ValueError) inputs that do not fit together, in one line, before anything is
            written. On CUDA, where looking would wait for the device, a position out of range gives
            NaN, is not written, and an assertion fails on the device.
    """
    q, k, v, cache_k, cache_v = map(_constant, (q, k, v, cache_k, cache_v))
    _check(q, k, v, cos, sin, cache_k, cache_v, positions)
    if q.dtype not in _DTYPES or not _library.has_kernels(q):
        return _reference(q, k, v, cos, sin, cache_k, cache_v, positions, interleaved)
    tables = [table.detach().float().contiguous() for table in (cos, sin)]
    try:
        out: Tensor = torch.ops.rlir.rotary_append_.default(
            q, k, v, *tables, cache_k, cache_v, positions.contiguous(), interleaved
        )
    except RuntimeError as error:
        raise input_error(_OP, error) from None
    return out


def rotary_append_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    cache_k: Tensor,
    cache_v: Tensor,
    positions: Tensor,
    *,
    interleaved: bool = False,
) -> Tensor:
    """``rotary_append_`` in plain PyTorch, on any device, in float64 if q is."""
    q, k, v, cache_k, cache_v = map(_constant, (q, k, v, cache_k, cache_v))
    _check(q, k, v, cos, sin, cache_k, cache_v, positions)
    return _reference(q, k, v, cos, sin, cache_k, cache_v, positions, interleaved)


def _constant(x: Tensor) -> Tensor:
    return x.detach() if x.requires_grad else x


def _reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    cache_k: Tensor,
    cache_v: Tensor,
    positions: Tensor,
    interleaved: bool,
) -> Tensor:
    if not torch.compiler.is_compiling() and positions.numel():
        limit = min(cache_k.shape[1], cos.shape[0])
        low, high = int(positions.min()), int(positions.max())
        if low < 0 or high >= limit:
            raise InputError(
                f"{_OP}: positions must be from 0 and below {limit}, got {low if low < 0 else high}"
            )
        ordered = positions.sort(-1).values
        twice = ordered[:, 1:][ordered[:, 1:] == ordered[:, :-1]]
        if len(twice):
            raise InputError(f"{_OP}: positions of a row must differ, got {int(twice[0])} twice")
    cos, sin = cos[positions], sin[positions]
    rows = torch.arange(len(q), device=q.device)[:, None]
    cache_k[rows, positions] = rotate(k, cos, sin, interleaved).to(cache_k.dtype)
    cache_v[rows, positions] = v.to(cache_v.dtype)
    return rotate(q, cos, sin, interleaved).to(cache_k.dtype)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    cache_k: Tensor,
    cache_v: Tensor,
    positions: Tensor,
) -> None:
    tensors = {"q": q, "k": k, "v": v, "cache_k": cache_k, "cache_v": cache_v}
    rounds = q.dtype == torch.float32 and cache_k.dtype == torch.bfloat16
    for name, x in tensors.items():
        check_rotated(_OP, name, x)
        like = "cache_k" if rounds and name.startswith("cache") else "q"
        if x.dtype != tensors[like].dtype:
            dtype = tensors[like].dtype
            raise InputError(f"{_OP}: {name} must be {dtype} as {like} is, got {x.dtype}")
        if x.device != q.device:
            raise InputError(f"{_OP}: {name} must be on {q.device}, got {x.device}")
    b, t, _, d = q.shape
    heads, capacity = k.shape[2], cache_k.shape[1]
    for name, shape in (
        ("k", (b, t, heads, d)),
        ("v", (b, t, heads, d)),
        ("cache_k", (b, capacity, heads, d)),
        ("cache_v", (b, capacity, heads, d)),
    ):
        if tensors[name].shape != shape:
            raise InputError(
                f"{_OP}: {name} must be {list(shape)}, got shape {tuple(tensors[name].shape)}"
            )
    for name in ("cache_k", "cache_v"):
        cache = tensors[name]
        if cache.stride(3) != 1:
            raise InputError(f"{_OP}: {name} must be contiguous in D, got stride {cache.stride(3)}")
        if any(s == 0 and n > 1 for s, n in zip(cache.stride(), cache.shape, strict=True)):
            raise InputError(
                f"{_OP}: {name} must have memory for each of its elements, got stride 0"
            )
    check_table(_OP, "cos", cos, ((cos.shape[0] if cos.dim() else 0, d),), q.device)
    check_table(_OP, "sin", sin, (tuple(cos.shape),), q.device)
    if positions.dtype != torch.int64:
        raise InputError(f"{_OP}: positions must be torch.int64, got {positions.dtype}")
    if positions.shape != (b, t):
        raise InputError(f"{_OP}: positions must be {[b, t]}, got shape {tuple(positions.shape)}")
    if positions.device != q.device:
        raise InputError(f"{_OP}: positions must be on {q.device}, got {positions.device}")


if _library.PATH is not None:

    @torch.library.register_fake("rlir::rotary_append_")
    def _fake(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cos: Tensor,
        sin: Tensor,
        cache_k: Tensor,
        cache_v: Tensor,
        positions: Tensor,
        interleaved: bool,
    ) -> Tensor:
        return q.new_empty(q.shape, dtype=cache_k.dtype)
