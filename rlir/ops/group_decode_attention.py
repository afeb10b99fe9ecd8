"""Decoding attention of rollouts that share a prompt: its keys are stored and read once a group.

out_i = sum_j softmax_j(scale q_i k_j) v_j over [the group's prefix | the rollout's suffix]
"""

import torch
from torch import Tensor

from rlir import _library
from rlir.ops._attention import (
    attend,
    check_group,
    check_heads,
    check_integers,
    check_lengths,
    check_mask,
    check_positions,
    check_shape,
    runs_reference,
    scale_of,
)
from rlir.ops._masks import Mask, causal, sees
from rlir.ops._support import input_error
from rlir.tracing import traced

_OP = "group_decode_attention"
_CAUSAL = causal()


@traced
def group_decode_attention(
    q: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    suffix_k: Tensor,
    suffix_v: Tensor,
    *,
    prefix_lengths: Tensor,
    suffix_lengths: Tensor,
    group_size: int,
    q_positions: Tensor | None = None,
    mask: Mask = _CAUSAL,
    scale: float | None = None,
) -> Tensor:
    """Attention of each rollout's queries to its group's prefix and then its own suffix.

    Rollout n is of group n // ``group_size``. Its stream is the prefix's first prefix_length slots,
    then the suffix's: suffix slot j has position prefix_length + j.

    Args:
        q: [B G, Tq, Hq, D], G = ``group_size``. float32 or bfloat16, D up to 256, any
            strides. (Other sizes, float64 and float16 run the reference.) Several queries of a
            rollout go through together, as diagonal decoding has them.
        prefix_k, prefix_v: [B, P, Hkv, D], once a group; P may be 0.
        suffix_k, suffix_v: [B G, S, Hkv, D]; S may be 0.
        prefix_lengths: int64 [B]; suffix_lengths: int64 [B G]: slots that are written. What is in
            others does not matter, nor in slots that no query sees.
        q_positions: int64 [B G, Tq] or [Tq], from 0 and below 2^31. None: the last query stands at
            its stream's last slot.
        mask: as in ``video_attention``.
        scale: of the scores, > 0; 1 / sqrt(D) if None.

    Returns:
        [B G, Tq, Hq, D] in q's dtype, 0 where a query sees nothing. No gradients: train with
        ``video_attention`` or ``group_attention``, which give these bits on the CPU. There the bits
        of a query depend on it and on what it sees: not on the group, on which queries come
        together, on where the prefix ends, or on threads.

    Raises:
        InputError: (a ValueError) inputs that do not fit together, in one line.
    """
    q, prefix_k, prefix_v, suffix_k, suffix_v = [
        x.detach() if x.requires_grad else x for x in (q, prefix_k, prefix_v, suffix_k, suffix_v)
    ]
    tensors = (q, prefix_k, prefix_v, suffix_k, suffix_v, prefix_lengths, suffix_lengths)
    if q.dim() != 4 or runs_reference(q) or torch.compiler.is_compiling():
        scale = _check(*tensors, q_positions, group_size, mask, scale)
        if runs_reference(q):
            return _reference(*tensors, q_positions, group_size, mask, scale)
    # A step's call may take less than all checks do. The operator has its own, in fewer words.
    check_mask(_OP, mask)
    scale = scale_of(_OP, scale, q.shape[3])
    try:
        out: Tensor = torch.ops.rlir.group_decode_attention.default(
            *tensors, q_positions, mask.kind, mask.numbers, group_size, scale
        )
        return out
    except RuntimeError as error:
        refused = input_error(_OP, error)
    _check(*tensors, q_positions, group_size, mask, scale)
    raise refused


def group_decode_attention_reference(
    q: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    suffix_k: Tensor,
    suffix_v: Tensor,
    *,
    prefix_lengths: Tensor,
    suffix_lengths: Tensor,
    group_size: int,
    q_positions: Tensor | None = None,
    mask: Mask = _CAUSAL,
    scale: float | None = None,
) -> Tensor:
    """``group_decode_attention`` in plain PyTorch, the prefix copied to every rollout.

    On any device, in float64 if q is; differentiable.
    """
    tensors = (q, prefix_k, prefix_v, suffix_k, suffix_v, prefix_lengths, suffix_lengths)
    scale = _check(*tensors, q_positions, group_size, mask, scale)
    return _reference(*tensors, q_positions, group_size, mask, scale)


def _reference(
    q: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    suffix_k: Tensor,
    suffix_v: Tensor,
    prefix_lengths: Tensor,
    suffix_lengths: Tensor,
    q_positions: Tensor | None,
    group_size: int,
    mask: Mask,
    scale: float,
) -> Tensor:
    rollouts, tq = q.shape[:2]
    p, s = prefix_k.shape[1], suffix_k.shape[1]
    check_lengths(_OP, "prefix_lengths", prefix_lengths, p)
    check_lengths(_OP, "suffix_lengths", suffix_lengths, s)
    queries, first, second = (torch.arange(t, device=q.device) for t in (tq, p, s))
    start = prefix_lengths.repeat_interleave(group_size)[:, None]
    length = suffix_lengths[:, None]
    if q_positions is None:
        q_positions = start + length - tq + queries
    else:
        q_positions = q_positions.expand(rollouts, tq)
        check_positions(_OP, q_positions, torch.ones_like(q_positions, dtype=torch.bool))
    positions = torch.cat([first.expand(rollouts, p), start + second], 1)
    written = torch.cat([first < start, second < length], 1)
    seen = sees(mask, q_positions, positions) & written[:, None]
    k, v = (
        torch.cat([prefix.repeat_interleave(group_size, 0), suffix], 1)
        for prefix, suffix in ((prefix_k, suffix_k), (prefix_v, suffix_v))
    )
    return attend(q, k, v, seen, scale)[0]


def _check(
    q: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    suffix_k: Tensor,
    suffix_v: Tensor,
    prefix_lengths: Tensor,
    suffix_lengths: Tensor,
    q_positions: Tensor | None,
    group_size: int,
    mask: Mask,
    scale: float | None,
) -> float:
    """Returns the scale."""
    check_mask(_OP, mask)
    kept = {"prefix_k": prefix_k, "prefix_v": prefix_v, "suffix_k": suffix_k, "suffix_v": suffix_v}
    check_heads(_OP, {"q": q, **kept})
    rollouts, tq, _, d = q.shape
    groups = check_group(_OP, "q", rollouts, group_size)
    heads = prefix_k.shape[2]
    check_shape(_OP, "prefix_k", prefix_k, (groups, prefix_k.shape[1], heads, d))
    check_shape(_OP, "prefix_v", prefix_v, tuple(prefix_k.shape))
    check_shape(_OP, "suffix_k", suffix_k, (rollouts, suffix_k.shape[1], heads, d))
    check_shape(_OP, "suffix_v", suffix_v, tuple(suffix_k.shape))
    check_integers(_OP, "prefix_lengths", prefix_lengths, (groups,), q.device)
    check_integers(_OP, "suffix_lengths", suffix_lengths, (rollouts,), q.device)
    if q_positions is not None:
        shape = (tq,) if q_positions.dim() == 1 else (rollouts, tq)
        check_integers(_OP, "q_positions", q_positions, shape, q.device)
    return scale_of(_OP, scale, d)


if _library.PATH is not None:

    @torch.library.register_fake("rlir::group_decode_attention")
    def _fake(
        q: Tensor,
        prefix_k: Tensor,
        prefix_v: Tensor,
        suffix_k: Tensor,
        suffix_v: Tensor,
        prefix_lengths: Tensor,
        suffix_lengths: Tensor,
        q_positions: Tensor | None,
        mask: str,
        mask_numbers: list[int],
        group_size: int,
        scale: float,
    ) -> Tensor:
        return q.new_empty(q.shape)
