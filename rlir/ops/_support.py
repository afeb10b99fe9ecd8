"""What selected_logprob and sample_tokens share: supports as bit masks, truncation, checks."""

import math

import torch
from torch import Tensor

from rlir.errors import InputError


def pack_support(mask: Tensor) -> Tensor:
    """A bool mask [N, V] as bits: uint8 [N, ceil(V / 8)], token v in bit v % 8 of byte v // 8."""
    n, v = mask.shape
    padded = torch.nn.functional.pad(mask.to(torch.uint8), (0, -v % 8))
    weights = 1 << torch.arange(8, device=mask.device)
    return (padded.view(n, (v + 7) // 8, 8) * weights).sum(-1).to(torch.uint8)


def unpack_support(support: Tensor, tokens: int) -> Tensor:
    """The bool mask [N, V] of a support uint8 [N, ceil(V / 8)]; ``tokens`` is V."""
    bits = support.unsqueeze(-1) >> torch.arange(8, device=support.device, dtype=torch.uint8) & 1
    return bits.flatten(1)[:, :tokens].bool()


def truncated(
    z: Tensor, top_k: int | None, top_p: float | None, min_p: float | None = None
) -> Tensor:
    """Which tokens top_k, then top_p, then min_p leave of z [N, V]: bool [N, V], by a sort.

    Among equal z the lower token comes first. Tokens at -inf are never in.
    """
    inside = z > -math.inf
    values, order = z.sort(dim=-1, descending=True, stable=True)
    keep = values > -math.inf
    if top_k is not None:
        keep = keep & (torch.arange(z.shape[1], device=z.device) < top_k)
    if top_p is not None and top_p < 1:
        mass = (values - values[:, :1]).exp().where(keep, 0).double()
        before = mass.cumsum(-1) - mass
        keep = keep & (before < top_p * mass.sum(-1, keepdim=True))
    if min_p is not None and min_p > 0:
        keep = keep & (values >= values[:, :1] + math.log(min_p))
    return torch.zeros_like(inside).scatter_(1, order, keep) & inside


def check_common(
    op: str,
    tokens: int,
    temperature: float,
    vocab_range: tuple[int, int] | None,
    top_k: int | None,
    top_p: float | None,
) -> None:
    """Checks of the arguments that both ops have; ``tokens`` is V."""
    # The kernels divide in float32: what underflows there is no temperature.
    if not (0 < temperature < math.inf and 2.0**-149 <= temperature < 2.0**128):
        raise InputError(f"{op}: temperature must be finite and > 0, got {temperature}")
    low, high = (0, tokens) if vocab_range is None else vocab_range
    if not 0 <= low < high <= tokens:
        raise InputError(
            f"{op}: vocab_range must satisfy 0 <= low < high <= {tokens}, got ({low}, {high})"
        )
    if top_k is not None and top_k < 1:
        raise InputError(f"{op}: top_k must be >= 1 or None, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise InputError(f"{op}: top_p must be in (0, 1] or None, got {top_p}")


def input_error(op: str, error: RuntimeError) -> Exception:
    """What only a look at values could tell, raised by a kernel, as the user's error."""
    line = str(error).splitlines()[0]
    return InputError(line) if line.startswith(f"{op}: ") else error
