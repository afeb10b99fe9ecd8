"""Which code computes ``video_attention``: rlir's kernels, a library for GPUs, or the reference.

flash-attn and xformers are optional (``rlir[gpu]``). They know plain causal masks on CUDA; all
else is rlir's. Neither was ever run here on a GPU: the tests put modules in their place that do in
plain PyTorch what the libraries document.
"""

import functools
import importlib
import re
from types import TracebackType

import torch
from torch import Tensor

from rlir import _library
from rlir.errors import InputError
from rlir.ops._attention import runs_reference
from rlir.ops._masks import Mask

LIBRARIES = {
    "flash-attn": ("flash_attn", ("flash_attn_func",), (2, 3)),
    "xformers": (
        "xformers.ops.fmha",
        (
            "memory_efficient_attention",
            "attn_bias.LowerTriangularFromBottomRightLocalAttentionMask",
        ),
        (),
    ),
}
"""Module, what is used of it, and the oldest version, of libraries in the order "auto" takes them.

flash-attn aligned causal masks at the top left before 2.1 and had no windows before 2.3.
"""
NAMES = ("auto", "rlir", *LIBRARIES)
_ALIGNED = 8
"""Elements of bfloat16 in the 16 bytes that the libraries load at once."""

_chosen = "auto"


class attention_backend:  # noqa: N801 - reads as a function, as torch.no_grad does
    """Choose what computes ``video_attention`` on CUDA, from here on or in a ``with`` block.

    Args:
        name: "auto": rlir's kernels where they are built and take the input, otherwise flash-attn,
            otherwise xformers, otherwise the reference. "rlir": rlir's kernels, otherwise the
            reference. "flash-attn" or "xformers": that library where it can, otherwise as "rlir".

    A library serves bfloat16 on a GPU of compute capability 8.0 or later, under ``causal()`` or
    ``causal(window_tokens)``, without positions and lengths, with no more queries than keys, and no
    gradients if torch is to be deterministic. flash-attn: D a multiple of 8 up to 256, the lse
    where no gradients are needed (it gives lse none). xformers: D a multiple of 8 up to 128, no
    lse, windows where no gradients are needed.

    The choice is of the process, not of a thread. The CPU is not concerned.

    Raises:
        InputError: (a ValueError) a library that is not installed, in one line.
    """

    def __init__(self, name: str):
        global _chosen
        if name not in NAMES:
            raise InputError(
                f"attention_backend: name must be one of {', '.join(NAMES)}, got {name!r}"
            )
        problem = problem_of(name) if name in LIBRARIES else None
        if problem is not None:
            raise InputError(f"attention_backend: {name} {problem}: pip install 'rlir[gpu]'")
        self._before, _chosen = _chosen, name

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        global _chosen
        _chosen = self._before


def chosen() -> str:
    """The name last given to ``attention_backend``."""
    return _chosen


@functools.cache
def problem_of(library: str) -> str | None:
    """Why a library cannot be used, "must ..., got ...", or None. Imports it."""
    name, needed, oldest = LIBRARIES[library]
    try:
        module = importlib.import_module(name)
        for attribute in needed:
            functools.reduce(getattr, attribute.split("."), module)
    except Exception as error:  # a broken install can raise anything
        lines = str(error).splitlines()
        return f"must be installed, got {lines[0] if lines else type(error).__name__}"
    version = str(getattr(module, "__version__", ""))
    if tuple(int(x) for x in re.findall(r"\d+", version)[:2]) < oldest:
        wanted = ".".join(str(x) for x in oldest)
        return f"must be {wanted} or later, got {version or 'an unknown version'}"
    return None


@torch.compiler.assume_constant_result
def installed() -> tuple[str, ...]:
    """The libraries that can be used. Imports them."""
    return tuple(library for library in LIBRARIES if problem_of(library) is None)


def decide(
    name: str,
    available: tuple[str, ...],
    *,
    kernels: bool,
    device: str,
    dtype: torch.dtype,
    head_size: int,
    mask: Mask,
    plain: bool,
    gradients: bool,
    lse: bool,
) -> str:
    """What computes: "rlir", "reference" or a library.

    Args:
        name: what was chosen; available: libraries that can be used.
        kernels: whether rlir has kernels for the input.
        plain: no positions and no lengths, and from 1 to Tk queries.
        gradients, lse: what is needed.
    """
    own = "rlir" if kernels else "reference"
    if device != "cuda" or name == "rlir" or (name == "auto" and kernels):
        return own
    if not plain or mask.kind != "causal" or dtype != torch.bfloat16 or head_size % _ALIGNED:
        return own
    (window,) = mask.numbers
    able = {
        "flash-attn": head_size <= 256 and not (lse and gradients),
        "xformers": head_size <= 128 and not lse and not (window and gradients),
    }
    for library in LIBRARIES:
        if library in available and name in ("auto", library) and able[library]:
            return library
    return own


def backend_of(q: Tensor, k: Tensor, v: Tensor, mask: Mask, bare: bool, lse: bool) -> str:
    """``decide`` for a call of ``video_attention``; bare: without positions and lengths."""
    kernels = not runs_reference(q)
    gradients = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    available = _available(q, kernels, gradients)
    # Sizes are compared only where it matters: torch.compile would make a graph for each answer.
    plain = bool(available) and bare and q.numel() > 0 and q.shape[1] <= k.shape[1]
    return decide(
        *(_chosen, available),
        kernels=kernels,
        device=q.device.type,
        dtype=q.dtype,
        head_size=q.shape[-1],
        mask=mask,
        plain=plain,
        gradients=gradients,
        lse=lse,
    )


def libraries_on(device: torch.device) -> tuple[str, ...]:
    """The libraries that can be used on a CUDA device: they need bfloat16 in hardware."""
    modern = torch.cuda.get_device_properties(device).major >= 8
    return installed() if modern and not _library.FORCE_REFERENCE else ()


def _available(q: Tensor, kernels: bool, gradients: bool) -> tuple[str, ...]:
    """Looks no further than it must: libraries are imported only where one may serve."""
    if not q.is_cuda or _chosen == "rlir" or (_chosen == "auto" and kernels):
        return ()
    if gradients and torch.are_deterministic_algorithms_enabled():
        return ()
    return libraries_on(q.device)


def attend_with(
    library: str, q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, lse: bool
) -> Tensor | tuple[Tensor, Tensor]:
    """What ``video_attention`` returns, from a library that ``decide`` chose."""
    tq, tk = q.shape[1], k.shape[1]
    (window,) = mask.numbers
    if window and tk > tq + window - 1:
        # What no query sees must have no influence, even if it is NaN; the libraries multiply it
        # by 0 where a block of keys is seen in part. The last query stays at the last key.
        k, v = (x[:, tk - tq - window + 1 :] for x in (k, v))
    q, k, v = (_aligned(x) for x in (q, k, v))
    if library == "flash-attn":
        return _flash_attn(q, k, v, window, scale, lse)
    return _xformers(q, k, v, window, scale)


def _flash_attn(
    q: Tensor, k: Tensor, v: Tensor, window: int, scale: float, lse: bool
) -> Tensor | tuple[Tensor, Tensor]:
    from flash_attn import flash_attn_func

    # The two ends of its window count keys beside the query's own; -1 is no limit.
    ends = (window - 1, 0) if window else (-1, -1)
    result = flash_attn_func(
        q, k, v, softmax_scale=scale, causal=True, window_size=ends, return_attn_probs=lse
    )
    if lse:  # [B, Hq, Tq] there, and without a gradient
        return result[0], result[1].transpose(1, 2).contiguous()
    out: Tensor = result
    return out


def _xformers(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float) -> Tensor:
    from xformers.ops.fmha import attn_bias, memory_efficient_attention

    mask = attn_bias.LowerTriangularFromBottomRightMask()
    if window:
        mask = attn_bias.LowerTriangularFromBottomRightLocalAttentionMask(window)
    heads, ratio = k.shape[2], q.shape[2] // k.shape[2]
    grouped = ratio > 1 and not (q.requires_grad or k.requires_grad or v.requires_grad)
    if grouped:  # [B, T, Hkv, Hq / Hkv, D]: for the forward pass alone
        q = q.unflatten(2, (heads, ratio))
        k, v = (x.unsqueeze(3).expand(-1, -1, -1, ratio, -1) for x in (k, v))
    elif ratio > 1:
        k, v = (x.repeat_interleave(ratio, 2) for x in (k, v))
    out: Tensor = memory_efficient_attention(q, k, v, attn_bias=mask, scale=scale)
    return out.flatten(2, 3) if grouped else out


def _aligned(x: Tensor) -> Tensor:
    """Rows that begin at multiples of 16 bytes, D contiguous: x itself, or a copy.

    A copy under torch.compile, which cannot ask where a tensor begins.
    """
    if not torch.compiler.is_compiling() and x.stride(-1) == 1:
        offsets = (x.storage_offset(), *x.stride()[:-1])
        if all(offset % _ALIGNED == 0 for offset in offsets):
            return x
    return x.clone(memory_format=torch.contiguous_format)
