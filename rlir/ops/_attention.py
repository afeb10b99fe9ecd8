"""What the attention ops share: the plain PyTorch reference and checks of inputs.

out_i = sum_j p_ij v_j,  p_ij = exp(scale q_i k_j - lse_i),  lse_i = log sum_j exp(scale q_i k_j),
over the keys j that query i sees.
"""

import math

import torch
from torch import Tensor

from rlir import _library
from rlir.errors import InputError
from rlir.ops._masks import Mask

HEAD_SIZES = (32, 64, 128)
"""D of the CUDA kernels."""
LARGEST_HEAD = 256
"""D of the CPU kernels goes up to here. Others run the reference."""
_DTYPES = (torch.float32, torch.bfloat16)


def runs_reference(q: Tensor) -> bool:
    size = q.shape[-1]
    known = 1 <= size <= LARGEST_HEAD if q.device.type == "cpu" else size in HEAD_SIZES
    return not _library.has_kernels(q) or q.dtype not in _DTYPES or not known


def attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Out like q, and lse [B, Tq, Hq], of q [B, Tq, Hq, D], k and v [B, Tk, Hkv, D] and what of
    the keys queries see, bool [B, Tq, Tk].

    In float64 if q is, otherwise in float32, as lse is. A query that sees nothing has out 0, lse
    -inf and no gradient. What no query of a row sees has no influence, not even if it is NaN.
    """
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    answered, used = seen.any(-1), seen.any(-2)
    wide = [
        x.to(dtype).where(kept[..., None, None], 0)
        for x, kept in ((q, answered), (k, used), (v, used))
    ]
    heads = k.shape[2]
    z = torch.einsum("bqhgd,bkhd->bqhgk", wide[0].unflatten(2, (heads, -1)), wide[1]) * scale
    sees_some = answered[:, :, None, None]
    z = z.masked_fill(~seen[:, :, None, None], -math.inf).where(sees_some[..., None], 0)
    lse = z.logsumexp(-1)
    out = torch.einsum("bqhgk,bkhd->bqhgd", (z - lse[..., None]).exp(), wide[2])
    out = out.where(sees_some[..., None], 0).flatten(2, 3)
    return out.to(q.dtype), lse.where(sees_some, -math.inf).flatten(2, 3)


def scale_of(op: str, scale: float | None, head_size: int) -> float:
    """1 / sqrt(D) if None."""
    if scale is None:
        return 1 / math.sqrt(head_size)
    if not 0 < scale < math.inf:
        raise InputError(f"{op}: scale must be finite and > 0, or None, got {scale}")
    return float(scale)


def check_mask(op: str, mask: object) -> None:
    if not isinstance(mask, Mask):
        kind = type(mask).__name__
        raise InputError(f"{op}: mask must be causal(), frame_causal() or diagonal(), got a {kind}")


def check_heads(op: str, tensors: dict[str, Tensor]) -> None:
    """The first is the queries, [B, T, Hq, D]; the rest are keys and values, [B, T, Hkv, D]."""
    names = list(tensors)
    q, k = tensors[names[0]], tensors[names[1]]
    for name, x in tensors.items():
        if x.dim() != 4:
            shape = "[B, T, Hq, D]" if x is q else "[B, T, Hkv, D]"
            raise InputError(f"{op}: {name} must be {shape}, got shape {tuple(x.shape)}")
        if not x.dtype.is_floating_point:
            raise InputError(f"{op}: {name} must be of floating point, got {x.dtype}")
        if x.dtype != q.dtype:
            raise InputError(f"{op}: {name} must be {q.dtype} as {names[0]} is, got {x.dtype}")
        if x.device != q.device:
            raise InputError(f"{op}: {name} must be on {q.device}, got {x.device}")
    if q.shape[3] < 1:
        raise InputError(f"{op}: {names[0]} must have D >= 1, got shape {tuple(q.shape)}")
    if k.shape[2] < 1 or q.shape[2] < 1 or q.shape[2] % k.shape[2]:
        raise InputError(
            f"{op}: {names[0]} must have a multiple of {k.shape[2]} heads, as {names[1]} has, "
            f"got {q.shape[2]}"
        )


def check_shape(op: str, name: str, x: Tensor, shape: tuple[int, ...]) -> None:
    if x.shape != shape:
        raise InputError(f"{op}: {name} must be {list(shape)}, got shape {tuple(x.shape)}")


def check_integers(op: str, name: str, x: Tensor, shape: tuple[int, ...], device: object) -> None:
    """Lengths and positions."""
    if x.dtype != torch.int64:
        raise InputError(f"{op}: {name} must be torch.int64, got {x.dtype}")
    check_shape(op, name, x, shape)
    if x.device != device:
        raise InputError(f"{op}: {name} must be on {device}, got {x.device}")


def check_lengths(op: str, name: str, lengths: Tensor | None, longest: int) -> None:
    """Looks at values: for the references, as the kernels do on the CPU."""
    if lengths is None or not lengths.numel() or torch.compiler.is_compiling():
        return
    low, high = int(lengths.min()), int(lengths.max())
    if low < 0 or high > longest:
        raise InputError(
            f"{op}: {name} must be from 0 to {longest}, got {low if low < 0 else high}"
        )


def check_positions(op: str, positions: Tensor, there: Tensor) -> None:
    """Given positions, where queries are ``there``; looks at values, as ``check_lengths`` does."""
    if torch.compiler.is_compiling():
        return
    wrong = positions[there & ((positions < 0) | (positions >= 2**31 - 1))]
    if len(wrong):
        raise InputError(
            f"{op}: q_positions must be from 0 and below 2^31, got {int(wrong.flatten()[0])}"
        )


def check_group(op: str, name: str, rollouts: int, group_size: int) -> int:
    """How many groups ``rollouts`` are."""
    if not isinstance(group_size, int) or group_size < 1:
        raise InputError(f"{op}: group_size must be an integer >= 1, got {group_size!r}")
    if rollouts % group_size:
        raise InputError(
            f"{op}: {name} must have a multiple of group_size {group_size} rows, got {rollouts}"
        )
    return rollouts // group_size
