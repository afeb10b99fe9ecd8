"""Attention of a prefix and G suffixes that continue it, for training: the prefix runs once.

out_i = sum_j softmax_j(scale q_i k_j) v_j; a suffix's queries see [the prefix | their suffix]
"""

from typing import Any

import torch
from torch import Tensor

from rlir import _library
from rlir.ops._attention import (
    attend,
    check_group,
    check_heads,
    check_mask,
    check_shape,
    runs_reference,
    scale_of,
)
from rlir.ops._masks import Mask, visible
from rlir.ops._support import input_error
from rlir.tracing import traced

_OP = "group_attention"


@traced
def group_attention(
    q_prefix: Tensor,
    k_prefix: Tensor,
    v_prefix: Tensor,
    q_suffix: Tensor,
    k_suffix: Tensor,
    v_suffix: Tensor,
    *,
    group_size: int,
    mask: Mask,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """``video_attention`` of [prefix | suffix] for each of G suffixes, the prefix computed once.

    Suffix n continues prefix n // ``group_size``: its slot j stands at position P + j.

    Args:
        q_prefix: [B, P, Hq, D]; k_prefix, v_prefix: [B, P, Hkv, D]; P may be 0.
        q_suffix: [B G, S, Hq, D], G = ``group_size``; k_suffix, v_suffix: [B G, S, Hkv, D]; S may
            be 0. float32 or bfloat16, D up to 256, any strides. (Other sizes, float64 and
            float16 run the reference.)
        mask: as in ``video_attention``. The prefix does not see its suffixes, whatever it is: under
            ``frame_causal`` it should end with a frame.
        scale: of the scores, > 0; 1 / sqrt(D) if None.

    Returns:
        out_prefix [B, P, Hq, D] and out_suffix [B G, S, Hq, D], in the queries' dtype. Gradients
        flow to all six; that of the prefix's keys and values is the sum over its own queries and
        the group. On the CPU the outputs have the bits of ``video_attention`` on whole sequences.

    Raises:
        InputError: (a ValueError) inputs that do not fit together, in one line.
    """
    tensors = (q_prefix, k_prefix, v_prefix, q_suffix, k_suffix, v_suffix)
    scale = _check(*tensors, group_size, mask, scale)
    if runs_reference(q_prefix):
        return _reference(*tensors, group_size, mask, scale)
    try:
        out_prefix, _, out_suffix, _ = torch.ops.rlir.group_attention.default(
            *tensors, group_size, mask.kind, mask.numbers, scale
        )
    except RuntimeError as error:
        raise input_error(_OP, error) from None
    return out_prefix, out_suffix


def group_attention_reference(
    q_prefix: Tensor,
    k_prefix: Tensor,
    v_prefix: Tensor,
    q_suffix: Tensor,
    k_suffix: Tensor,
    v_suffix: Tensor,
    *,
    group_size: int,
    mask: Mask,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """``group_attention`` in plain PyTorch, the prefix's keys copied to every suffix.

    On any device, in float64 if the queries are.
    """
    tensors = (q_prefix, k_prefix, v_prefix, q_suffix, k_suffix, v_suffix)
    scale = _check(*tensors, group_size, mask, scale)
    return _reference(*tensors, group_size, mask, scale)


def _reference(
    q_prefix: Tensor,
    k_prefix: Tensor,
    v_prefix: Tensor,
    q_suffix: Tensor,
    k_suffix: Tensor,
    v_suffix: Tensor,
    group_size: int,
    mask: Mask,
    scale: float,
) -> tuple[Tensor, Tensor]:
    groups, p = q_prefix.shape[:2]
    rollouts, s = q_suffix.shape[:2]
    seen = visible(mask, torch.arange(p + s, device=q_prefix.device), p + s)
    within = seen[:p, :p].expand(groups, p, p)
    out_prefix, _ = attend(q_prefix, k_prefix, v_prefix, within, scale)
    k, v = (
        torch.cat([prefix.repeat_interleave(group_size, 0), suffix], 1)
        for prefix, suffix in ((k_prefix, k_suffix), (v_prefix, v_suffix))
    )
    out_suffix, _ = attend(q_suffix, k, v, seen[p:].expand(rollouts, s, p + s), scale)
    return out_prefix, out_suffix


def _check(
    q_prefix: Tensor,
    k_prefix: Tensor,
    v_prefix: Tensor,
    q_suffix: Tensor,
    k_suffix: Tensor,
    v_suffix: Tensor,
    group_size: int,
    mask: Mask,
    scale: float | None,
) -> float:
    """Returns the scale."""
    check_mask(_OP, mask)
    kept = {"k_prefix": k_prefix, "v_prefix": v_prefix, "k_suffix": k_suffix, "v_suffix": v_suffix}
    check_heads(_OP, {"q_prefix": q_prefix, **kept})
    check_heads(_OP, {"q_suffix": q_suffix, **kept})
    rollouts, s, hq, d = q_suffix.shape
    groups = check_group(_OP, "q_suffix", rollouts, group_size)
    p, heads = q_prefix.shape[1], k_prefix.shape[2]
    for name, x, shape in (
        ("q_prefix", q_prefix, (groups, p, hq, d)),
        ("k_prefix", k_prefix, (groups, p, heads, d)),
        ("v_prefix", v_prefix, (groups, p, heads, d)),
        ("k_suffix", k_suffix, (rollouts, s, heads, d)),
        ("v_suffix", v_suffix, (rollouts, s, heads, d)),
    ):
        check_shape(_OP, name, x, shape)
    return scale_of(_OP, scale, d)


if _library.PATH is not None:

    @torch.library.register_fake("rlir::group_attention")
    def _fake(
        q_prefix: Tensor,
        k_prefix: Tensor,
        v_prefix: Tensor,
        q_suffix: Tensor,
        k_suffix: Tensor,
        v_suffix: Tensor,
        group_size: int,
        mask: str,
        mask_numbers: list[int],
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return (
            q_prefix.new_empty(q_prefix.shape),
            q_prefix.new_empty(q_prefix.shape[:3], dtype=torch.float32),
            q_suffix.new_empty(q_suffix.shape),
            q_suffix.new_empty(q_suffix.shape[:3], dtype=torch.float32),
        )

    @torch.library.register_fake("rlir::group_attention_backward")
    def _fake_backward(
        grad_out_prefix: Tensor | None,
        grad_out_suffix: Tensor | None,
        q_prefix: Tensor,
        k_prefix: Tensor,
        v_prefix: Tensor,
        q_suffix: Tensor,
        k_suffix: Tensor,
        v_suffix: Tensor,
        out_prefix: Tensor,
        lse_prefix: Tensor,
        out_suffix: Tensor,
        lse_suffix: Tensor,
        group_size: int,
        mask: str,
        mask_numbers: list[int],
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        return (
            q_prefix.new_empty(q_prefix.shape),
            k_prefix.new_empty(k_prefix.shape),
            v_prefix.new_empty(v_prefix.shape),
            q_suffix.new_empty(q_suffix.shape),
            k_suffix.new_empty(k_suffix.shape),
            v_suffix.new_empty(v_suffix.shape),
        )

    def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, group_size, mask, mask_numbers, scale = inputs
        ctx.save_for_backward(*tensors, *output)
        ctx.options = (group_size, mask, mask_numbers, scale)
        ctx.mark_non_differentiable(output[1], output[3])
        ctx.set_materialize_grads(False)

    def _backward(
        ctx: Any, d_prefix: Tensor | None, _: object, d_suffix: Tensor | None, __: object
    ) -> tuple[Tensor | None, ...]:
        if d_prefix is None and d_suffix is None:
            return (None,) * 10
        grads = torch.ops.rlir.group_attention_backward.default(
            d_prefix, d_suffix, *ctx.saved_tensors, *ctx.options
        )
        needed = [g if n else None for g, n in zip(grads, ctx.needs_input_grad, strict=False)]
        return (*needed, *(None,) * 4)

    torch.library.register_autograd("rlir::group_attention", _backward, setup_context=_save)
