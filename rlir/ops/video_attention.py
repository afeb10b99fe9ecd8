"""Attention under the masks of video: causal, causal across frames, diagonal within a frame.

out_i = sum_j softmax_j(scale q_i k_j) v_j over the keys j that query i sees
"""

from typing import Any, Literal, overload

import torch
from torch import Tensor

from rlir import _library
from rlir.ops._attention import (
    attend,
    check_heads,
    check_integers,
    check_lengths,
    check_mask,
    check_positions,
    check_shape,
    scale_of,
)
from rlir.ops._attention_backends import attend_with, backend_of
from rlir.ops._masks import Mask, visible
from rlir.ops._support import input_error
from rlir.tracing import traced

_OP = "video_attention"


@overload
def video_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask,
    scale: float | None = None,
    q_positions: Tensor | None = None,
    q_lengths: Tensor | None = None,
    k_lengths: Tensor | None = None,
    return_lse: Literal[False] = False,
) -> Tensor: ...


@overload
def video_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask,
    scale: float | None = None,
    q_positions: Tensor | None = None,
    q_lengths: Tensor | None = None,
    k_lengths: Tensor | None = None,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


@traced
def video_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask,
    scale: float | None = None,
    q_positions: Tensor | None = None,
    q_lengths: Tensor | None = None,
    k_lengths: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention of queries to the keys that ``mask`` lets them see, with its gradients.

    Neither scores nor the mask are ever in memory; blocks of keys that no query sees are skipped.

    Args:
        q: [B, Tq, Hq, D]; k, v: [B, Tk, Hkv, D], Hq a multiple of Hkv: query head h reads key head
            h // (Hq / Hkv). float32 or bfloat16, D up to 256, with any strides. (Other
            sizes, float64 and float16 run the reference.) Key slot j is position j of the stream.
        mask: ``causal()``, ``frame_causal(...)`` or ``diagonal(...)``.
        scale: of the scores, > 0; 1 / sqrt(D) if None.
        q_positions: int64 [B, Tq] or [Tq], from 0 and below 2^31: where queries stand. None: the
            last query of a row stands at its last key.
        q_lengths, k_lengths: int64 [B], or None: how many queries and keys of a row there are.
        return_lse: also the log of each softmax's denominator.

    Returns:
        [B, Tq, Hq, D] in q's dtype; with ``return_lse`` also float32 [B, Tq, Hq]. A query beyond
        its row's length, or one that sees no key, has 0, lse -inf, and no gradients. Gradients flow
        to q, k and v from either output, in their dtype. What no query sees has no influence, even
        if it is NaN. On the CPU the bits of a query depend on it and on what it sees: not on the
        batch, on which queries come together, or on threads; ``group_decode_attention`` and
        ``group_attention`` give the same. On CUDA ``attention_backend`` chooses what computes.

    Raises:
        InputError: (a ValueError) inputs that do not fit together, in one line.
    """
    scale = _check(q, k, v, mask, scale, q_positions, q_lengths, k_lengths)
    bare = q_positions is None and q_lengths is None and k_lengths is None
    backend = backend_of(q, k, v, mask, bare, return_lse)
    if backend == "reference":
        out, lse = _reference(q, k, v, mask, scale, q_positions, q_lengths, k_lengths)
    elif backend == "rlir":
        try:
            out, lse = torch.ops.rlir.video_attention.default(
                *(q, k, v, q_positions, q_lengths, k_lengths),
                *(mask.kind, mask.numbers, scale),
            )
        except RuntimeError as error:
            raise input_error(_OP, error) from None
    else:
        return attend_with(backend, q, k, v, mask, scale, return_lse)
    return (out, lse) if return_lse else out


def video_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask,
    scale: float | None = None,
    q_positions: Tensor | None = None,
    q_lengths: Tensor | None = None,
    k_lengths: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """``video_attention`` in plain PyTorch, with all scores, on any device, in float64 if q is."""
    scale = _check(q, k, v, mask, scale, q_positions, q_lengths, k_lengths)
    out, lse = _reference(q, k, v, mask, scale, q_positions, q_lengths, k_lengths)
    return (out, lse) if return_lse else out


def _reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
    scale: float,
    q_positions: Tensor | None,
    q_lengths: Tensor | None,
    k_lengths: Tensor | None,
) -> tuple[Tensor, Tensor]:
    b, tq, tk = q.shape[0], q.shape[1], k.shape[1]
    check_lengths(_OP, "q_lengths", q_lengths, tq)
    check_lengths(_OP, "k_lengths", k_lengths, tk)
    queries, keys = (torch.arange(t, device=q.device) for t in (tq, tk))
    if q_lengths is None:
        q_lengths = queries.new_full((b,), tq)
    if k_lengths is None:
        k_lengths = queries.new_full((b,), tk)
    there = queries < q_lengths[:, None]
    if q_positions is None:
        q_positions = (k_lengths - q_lengths)[:, None] + queries
    else:
        q_positions = q_positions.expand(b, tq)
        check_positions(_OP, q_positions, there)
    seen = visible(mask, q_positions, tk)
    seen = seen & there[:, :, None] & (keys < k_lengths[:, None])[:, None]
    return attend(q, k, v, seen, scale)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
    scale: float | None,
    q_positions: Tensor | None,
    q_lengths: Tensor | None,
    k_lengths: Tensor | None,
) -> float:
    """Returns the scale."""
    check_mask(_OP, mask)
    check_heads(_OP, {"q": q, "k": k, "v": v})
    b, tq, _, d = q.shape
    check_shape(_OP, "k", k, (b, k.shape[1], k.shape[2], d))
    check_shape(_OP, "v", v, tuple(k.shape))
    if q_positions is not None:
        shape = (tq,) if q_positions.dim() == 1 else (b, tq)
        check_integers(_OP, "q_positions", q_positions, shape, q.device)
    for name, lengths in (("q_lengths", q_lengths), ("k_lengths", k_lengths)):
        if lengths is not None:
            check_integers(_OP, name, lengths, (b,), q.device)
    return scale_of(_OP, scale, d)


if _library.PATH is not None:

    @torch.library.register_fake("rlir::video_attention")
    def _fake(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_positions: Tensor | None,
        q_lengths: Tensor | None,
        k_lengths: Tensor | None,
        mask: str,
        mask_numbers: list[int],
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)

    @torch.library.register_fake("rlir::video_attention_backward")
    def _fake_backward(
        grad_out: Tensor,
        grad_lse: Tensor | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        q_positions: Tensor | None,
        q_lengths: Tensor | None,
        k_lengths: Tensor | None,
        mask: str,
        mask_numbers: list[int],
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)

    def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        q, k, v, q_positions, q_lengths, k_lengths, *ctx.options = inputs
        ctx.save_for_backward(q, k, v, *output, q_positions, q_lengths, k_lengths)
        ctx.set_materialize_grads(False)

    def _backward(
        ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, q_positions, q_lengths, k_lengths = ctx.saved_tensors
        if grad_out is None and grad_lse is None:
            return (None,) * 9
        grads = torch.ops.rlir.video_attention_backward.default(
            torch.zeros_like(out) if grad_out is None else grad_out,
            grad_lse,
            *(q, k, v, out, lse, q_positions, q_lengths, k_lengths),
            *ctx.options,
        )
        needed = [g if n else None for g, n in zip(grads, ctx.needs_input_grad, strict=False)]
        return (*needed, *(None,) * 6)

    torch.library.register_autograd("rlir::video_attention", _backward, setup_context=_save)
