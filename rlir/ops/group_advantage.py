"""Group-relative advantages of GRPO: mean, deviation, normalisation and clip in one pass.

A_i = clip((r_i - mean(group)) / (std(group) + eps), -clip, clip)
"""

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from rlir import _library
from rlir.errors import InputError
from rlir.tracing import traced

Scale = Literal["group", "batch", "none"]
Baseline = Literal["mean", "leave_one_out"]

_SCALES, _BASELINES = get_args(Scale), get_args(Baseline)  # looked up once: it takes a while
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@traced
def group_advantage(
    rewards: Tensor,
    group_ids: Tensor | None = None,
    *,
    group_size: int | None = None,
    scale: Scale = "group",
    baseline: Baseline = "mean",
    eps: float = 1e-4,
    clip: float | None = None,
    mask: Tensor | None = None,
    unbiased: bool = True,
) -> Tensor:
    """Advantage of each reward over the other rewards of its group.

    A_i = clip(b_i / (d + eps), -clip, clip), with b_i = r_i - baseline of the group, and d the
    standard deviation of the group (``scale="group"``), of all rewards that count in the batch
    (``"batch"``), or no division at all (``"none"``, Dr. GRPO).

    Args:
        rewards: [groups, members], or [rows] with ``group_ids`` or ``group_size``. float64,
            float32, bfloat16 or float16, with any strides.
        group_ids: int64 [rows], >= 0, in any order; groups may have unequal sizes.
        group_size: rows of each of the equal, consecutive groups of ``rewards`` [rows].
        scale: what the advantages are divided by.
        baseline: ``"mean"`` of the group, or ``"leave_one_out"``: the mean of the other members
            (RLOO), which is unbiased for a policy gradient.
        eps: added to the deviation (TRL's 1e-4).
        clip: bound of the absolute value, or None.
        mask: bool, the shape of ``rewards``; rows that are False take no part.
        unbiased: the deviation divides by n - 1 as torch.std does and with it TRL, verl and
            DanceGRPO; False divides by n as numpy.std does.

    Returns:
        Advantages, contiguous, in the shape and dtype of ``rewards``. They are constants: no
        gradient flows back. A row that is masked, or whose reward is NaN or infinite, takes no
        part and gets 0. A group without spread (equal rewards, or a single member) gets exact
        zeros. The bits depend on the rewards of the row's own group alone (and, for
        ``scale="batch"``, on the batch), not on threads, instruction set, other groups or rows
        that take no part; the CUDA kernel is written to give those of the CPU.

    Raises:
        InputError: (a ValueError) inputs that do not fit together, in one line. On CUDA, where
            looking at the ids would wait for the device, rows of a negative id get NaN and an
            assertion fails on the device.
    """
    rewards = rewards.detach()
    _check(rewards, group_ids, group_size, scale, baseline, eps, clip, mask)
    if not _library.has_kernels(rewards):
        return _reference(
            rewards, group_ids, group_size, scale, baseline, eps, clip, mask, unbiased
        )
    try:
        out: Tensor = torch.ops.rlir.group_advantage.default(
            rewards,
            group_ids,
            mask,
            group_size=group_size,
            scale=scale,
            baseline=baseline,
            eps=eps,
            clip=clip,
            unbiased=unbiased,
        )
    except RuntimeError as error:
        if str(error).startswith("group_advantage: "):  # what only a look at the ids can tell
            raise InputError(str(error).splitlines()[0]) from None
        raise
    return out


def group_advantage_reference(
    rewards: Tensor,
    group_ids: Tensor | None = None,
    *,
    group_size: int | None = None,
    scale: Scale = "group",
    baseline: Baseline = "mean",
    eps: float = 1e-4,
    clip: float | None = None,
    mask: Tensor | None = None,
    unbiased: bool = True,
) -> Tensor:
    """``group_advantage`` in plain PyTorch, on any device: what the kernels are held to.

    float64 rewards are worked on in float64, all others in float32.
    """
    rewards = rewards.detach()
    _check(rewards, group_ids, group_size, scale, baseline, eps, clip, mask)
    return _reference(rewards, group_ids, group_size, scale, baseline, eps, clip, mask, unbiased)


def _reference(
    rewards: Tensor,
    group_ids: Tensor | None,
    group_size: int | None,
    scale: Scale,
    baseline: Baseline,
    eps: float,
    clip: float | None,
    mask: Tensor | None,
    unbiased: bool,
) -> Tensor:
    dtype = torch.float64 if rewards.dtype == torch.float64 else torch.float32
    r = rewards.reshape(-1).to(dtype)  # [rows]
    counts = r.isfinite() if mask is None else r.isfinite() & mask.reshape(-1)
    r = r.where(counts, 0)
    if group_ids is not None:
        if (group_ids < 0).any():
            raise InputError(f"group_advantage: group_ids must be >= 0, got {int(group_ids.min())}")
        _, ids = torch.unique(group_ids, return_inverse=True)  # [rows], 0 .. groups - 1
        groups = int(ids.max()) + 1 if len(ids) else 0
    else:
        size = rewards.shape[1] if group_size is None else group_size
        groups = r.numel() // max(size, 1)
        ids = torch.arange(r.numel(), device=r.device) // max(size, 1)

    def total(x: Tensor) -> Tensor:  # [rows] -> [groups]
        return x.new_zeros(groups).index_add_(0, ids, x)

    freedom = 1 if unbiased else 0
    n = total(counts.to(dtype))
    b = (r - (total(r) / n.clamp(min=1))[ids]).where(counts, 0)
    own = (total(b.square()) / (n - freedom).clamp(min=1)).sqrt()[ids]
    highest = r.new_full((groups,), -math.inf)
    highest.scatter_reduce_(0, ids, r.masked_fill(~counts, -math.inf), "amax")
    lowest = r.new_full((groups,), math.inf)
    lowest.scatter_reduce_(0, ids, r.masked_fill(~counts, math.inf), "amin")
    spread = (highest > lowest)[ids] & counts
    if baseline == "leave_one_out":
        b = b * (n / (n - 1).clamp(min=1))[ids]
    if scale == "group":
        b = b / (own + eps)
    elif scale == "batch":
        n_all = counts.sum()
        mean = r.sum() / n_all.clamp(min=1)
        squares = (r - mean).where(counts, 0).square().sum()
        b = b / ((squares / (n_all - freedom).clamp(min=1)).sqrt() + eps)
    b = b.where(spread & b.isfinite(), 0)
    if clip is not None:
        b = b.clamp(-clip, clip)
    return b.to(rewards.dtype).reshape(rewards.shape)


def _check(
    rewards: Tensor,
    group_ids: Tensor | None,
    group_size: int | None,
    scale: str,
    baseline: str,
    eps: float,
    clip: float | None,
    mask: Tensor | None,
) -> None:
    if rewards.dtype not in _DTYPES:
        raise InputError(
            "group_advantage: rewards must be float64, float32, bfloat16 or float16, "
            f"got {rewards.dtype}"
        )
    if rewards.dim() not in (1, 2):
        raise InputError(
            "group_advantage: rewards must be [groups, members] or [rows], "
            f"got shape {tuple(rewards.shape)}"
        )
    if rewards.dim() == 2:
        if group_ids is not None or group_size is not None:
            name = "group_size" if group_ids is None else "group_ids"
            raise InputError(
                "group_advantage: rewards [groups, members] must come without group_ids and "
                f"group_size, got {name}"
            )
    elif (group_ids is None) == (group_size is None):
        raise InputError(
            "group_advantage: rewards [rows] must come with group_ids or group_size, "
            f"got {'neither' if group_ids is None else 'both'}"
        )
    if group_size is not None:
        if group_size < 1:
            raise InputError(f"group_advantage: group_size must be >= 1, got {group_size}")
        if rewards.shape[0] % group_size != 0:
            raise InputError(
                f"group_advantage: group_size must divide the {rewards.shape[0]} rewards, "
                f"got {group_size}"
            )
    for name, tensor, dtype in (("group_ids", group_ids, torch.int64), ("mask", mask, torch.bool)):
        if tensor is None:
            continue
        if tensor.dtype != dtype:
            raise InputError(f"group_advantage: {name} must be {dtype}, got {tensor.dtype}")
        if tensor.shape != rewards.shape:
            raise InputError(
                f"group_advantage: {name} must have the shape of rewards, "
                f"{tuple(rewards.shape)}, got {tuple(tensor.shape)}"
            )
        if tensor.device != rewards.device:
            raise InputError(
                f"group_advantage: {name} must be on {rewards.device}, got {tensor.device}"
            )
    if scale not in _SCALES:
        raise InputError(
            f"group_advantage: scale must be 'group', 'batch' or 'none', got {scale!r}"
        )
    if baseline not in _BASELINES:
        raise InputError(
            f"group_advantage: baseline must be 'mean' or 'leave_one_out', got {baseline!r}"
        )
    if not 0 <= eps < math.inf:
        raise InputError(f"group_advantage: eps must be finite and >= 0, got {eps}")
    if clip is not None and not clip > 0:
        raise InputError(f"group_advantage: clip must be > 0 or None, got {clip}")


if _library.PATH is not None:

    @torch.library.register_fake("rlir::group_advantage")
    def _fake(
        rewards: Tensor,
        group_ids: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        group_size: int | None = None,
        scale: str = "group",
        baseline: str = "mean",
        eps: float = 1e-4,
        clip: float | None = None,
        unbiased: bool = True,
    ) -> Tensor:
        return torch.empty_like(rewards, memory_format=torch.contiguous_format)
