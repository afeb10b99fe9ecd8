"""What the tests of the attention ops share: inputs, masks, plain PyTorch, digests of bits.

Run as a program with a number of threads, this file prints digests of the kernels' bits; the tests
run it under every instruction set.
"""

import hashlib
import json
import math
import sys
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import torch
from hypothesis import strategies as st
from row_cases import normal
from selected_logprob_cases import assert_all_close
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from rlir import _build_info
from rlir.ops import (
    Mask,
    causal,
    diagonal,
    frame_causal,
    group_attention,
    group_decode_attention,
    video_attention,
    visible,
)

FLOAT, BF16 = torch.float32, torch.bfloat16
DTYPES = (FLOAT, BF16)
MASKS = {
    "causal": causal(),
    "window": causal(70),
    "frame_causal": frame_causal(24, 5),
    "frame_window": frame_causal(20, 0, 3),
    "diagonal": diagonal(4, 6, 2, 5),
    "diagonal_window": diagonal(5, 8, 3, 2, 3, 0),
    "refresh": diagonal(4, 6, 2, 5, refresh=True),
    "refresh_window": diagonal(5, 8, 3, 2, 3, 0, refresh=True),
}
NAMES = ("out", "lse", "dq", "dk", "dv")


@st.composite
def masks(draw: st.DrawFn) -> Mask:
    """Any mask whose frames are small."""
    windows = st.none() | st.integers(1, 5)
    kind = draw(st.sampled_from(["causal", "frame_causal", "diagonal"]))
    if kind == "causal":
        return causal(draw(st.none() | st.integers(1, 200)))
    action = draw(st.integers(0, 7))
    if kind == "frame_causal":
        return frame_causal(draw(st.integers(1, 60)), action, draw(windows))
    columns = draw(st.integers(1, 9))
    rows, window = draw(st.integers(1, 6)), draw(st.integers(1, columns))
    refresh = window < columns and draw(st.booleans())
    context = draw(st.integers(0, 2))
    return diagonal(rows, columns, window, action, draw(windows), context, refresh)


# --- video_attention -----------------------------------------------------------------------------


@dataclass
class Inputs:
    """q [B, Tq, Hq, D], k and v [B, Tk, Hkv, D], gradients of out and lse, options."""

    q: Tensor
    k: Tensor
    v: Tensor
    d_out: Tensor
    d_lse: Tensor
    options: dict[str, Any] = field(default_factory=dict)


def inputs(
    b: int,
    tq: int,
    tk: int,
    heads: tuple[int, int] = (4, 2),
    d: int = 32,
    dtype: torch.dtype = FLOAT,
    seed: int = 0,
    **options: Any,
) -> Inputs:
    hq, hkv = heads
    return Inputs(
        normal(b, tq, hq, d, dtype=dtype, seed=seed),
        normal(b, tk, hkv, d, dtype=dtype, seed=seed + 1),
        normal(b, tk, hkv, d, dtype=dtype, seed=seed + 2),
        normal(b, tq, hq, d, dtype=dtype, seed=seed + 3),
        normal(b, tq, hq, seed=seed + 4),
        options,
    )


def seen_by(x: Inputs) -> Tensor:
    """bool [B, Tq, Tk]."""
    (b, tq), tk = x.q.shape[:2], x.k.shape[1]
    o = x.options
    q_lengths = o.get("q_lengths")
    k_lengths = o.get("k_lengths")
    q_lengths = torch.full((b,), tq) if q_lengths is None else q_lengths
    k_lengths = torch.full((b,), tk) if k_lengths is None else k_lengths
    positions = o.get("q_positions")
    if positions is None:
        positions = torch.arange(tq) + (k_lengths - q_lengths)[:, None]
    seen = visible(o["mask"], positions.expand(b, tq), tk)
    for row in range(b):
        seen[row, int(q_lengths[row]) :] = False
        seen[row, :, int(k_lengths[row]) :] = False
    return seen


def sdpa(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """What a trainer without fused ops has: torch's attention with a mask tensor, in q's dtype."""
    if not k.shape[1]:
        return torch.zeros_like(q) + 0 * q, torch.full(q.shape[:3], -math.inf)
    answered = seen.any(-1)
    mask = (seen | ~answered[..., None])[:, None]
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], 2).transpose(1, 2) for x in (k, v))
    q = q.transpose(1, 2)
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2)
    z = q @ k.transpose(2, 3)
    z = (z if z.dtype == torch.float64 else z.float()) * (
        q.shape[-1] ** -0.5 if scale is None else scale
    )
    lse = z.masked_fill(~mask, -math.inf).logsumexp(-1).transpose(1, 2)
    answered = answered[:, :, None]
    return out.where(answered[..., None], 0), lse.masked_fill(~answered, -math.inf)


def outputs(op: Any, x: Inputs, *, double: bool = False) -> list[Tensor]:
    """out, lse (0 for -inf) and the gradients of q, k and v."""
    dtype = torch.float64 if double else x.q.dtype
    leaves = [t.detach().to(dtype).requires_grad_() for t in (x.q, x.k, x.v)]
    with op.active() if hasattr(op, "active") else nullcontext():
        if op is sdpa:
            out, lse = sdpa(*leaves, seen_by(x), x.options.get("scale"))
        else:
            out, lse = getattr(op, "function", op)(*leaves, **x.options, return_lse=True)
        lse = lse.where(lse > -math.inf, 0)
        loss = (out * x.d_out.to(dtype)).sum() + (lse * x.d_lse).sum()
        grads = torch.autograd.grad(loss, leaves, materialize_grads=True)
    return [out.detach(), lse.detach(), *grads]


def jittered(*tensors: Tensor) -> list[Tensor]:
    """In float64, each value an ulp of float32 higher or lower."""
    g = torch.Generator().manual_seed(0)
    eps = torch.finfo(FLOAT).eps
    return [
        t.double() * (1 + eps * (2 * torch.randint(0, 2, t.shape, generator=g) - 1))
        for t in tensors
    ]


Case = list[Tensor]


def assert_2x(
    got: list[Case],
    peer: list[Case],
    truth: list[Case],
    moved: list[Case],
    names: tuple[str, ...],
    few: bool,
) -> None:
    """The 2x rule for each output over all cases.

    On a few values a peer can be lucky: then what the truth of jittered inputs, ``moved``, is off
    counts as well, four times, and 32 ulps of the largest value of all: where one key is seen
    its score's gradient is a difference of equal sums over a head.
    """
    for i, name in enumerate(names):
        ulp = torch.finfo(FLOAT).eps
        slack = 0.0
        for t, m in zip(truth, moved, strict=True):
            if few and t[i].numel():
                size = max(float(x.abs().max()) for x in t if x.numel())
                slack = max(slack, 4 * float((m[i] - t[i]).abs().max()) + 32 * ulp * size)
        cases = [(a[i], b[i], c[i]) for a, b, c in zip(got, peer, truth, strict=True)]
        assert_all_close(cases, name, slack)


def check_against_float64(op: Any, *cases: Inputs, few: bool = False) -> None:
    def moved(x: Inputs) -> Inputs:
        q, k, v = jittered(x.q, x.k, x.v)
        return replace(x, q=q, k=k, v=v)

    assert_2x(
        [outputs(op, x) for x in cases],
        [outputs(sdpa, x) for x in cases],
        [outputs(sdpa, x, double=True) for x in cases],
        [outputs(sdpa, moved(x), double=True) for x in cases],
        NAMES,
        few,
    )


# --- Groups --------------------------------------------------------------------------------------


@dataclass
class Group:
    """B prefixes of P slots and B G suffixes of S slots, with queries everywhere."""

    q_prefix: Tensor
    k_prefix: Tensor
    v_prefix: Tensor
    q_suffix: Tensor
    k_suffix: Tensor
    v_suffix: Tensor
    size: int

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (
            *(self.q_prefix, self.k_prefix, self.v_prefix),
            *(self.q_suffix, self.k_suffix, self.v_suffix),
        )

    def whole(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v of every rollout's whole sequence."""
        return tuple(
            torch.cat([prefix.repeat_interleave(self.size, 0), suffix], 1)
            for prefix, suffix in zip(self.tensors[:3], self.tensors[3:], strict=True)
        )


def group(
    b: int,
    size: int,
    p: int,
    s: int,
    heads: tuple[int, int] = (4, 2),
    d: int = 32,
    dtype: torch.dtype = FLOAT,
    seed: int = 0,
) -> Group:
    parts = []
    for i, (n, t) in enumerate(((b, p), (b * size, s))):
        for j, h in enumerate((heads[0], heads[1], heads[1])):
            parts.append(normal(n, t, h, d, dtype=dtype, seed=seed + 3 * i + j))
    return Group(*parts, size)


# --- The same bits -------------------------------------------------------------------------------


def main() -> None:
    torch.set_num_threads(int(sys.argv[1]))
    found = {"isa": _build_info.used_cpu_isa()}
    for dtype, d, (name, mask) in product(DTYPES, (32, 64, 128), MASKS.items()):
        digest = hashlib.sha256()

        def note(*tensors: Tensor, to: Any = digest) -> None:
            for x in tensors:
                to.update(x.contiguous().view(torch.uint8).numpy().tobytes())

        x = inputs(2, 150, 290, (6, 2), d, dtype)
        note(*video_attention(x.q, x.k, x.v, mask=mask, return_lse=True))
        g = group(1, 3, 137, 40, (4, 2), d, dtype)
        note(*group_attention(*g.tensors, group_size=3, mask=mask))
        for queries in (1, 7):
            note(
                group_decode_attention(
                    *(g.q_suffix[:, -queries:], g.k_prefix, g.v_prefix, g.k_suffix, g.v_suffix),
                    prefix_lengths=torch.tensor([131]),
                    suffix_lengths=torch.tensor([40, 0, 31]),
                    group_size=3,
                    mask=mask,
                )
            )
        found[f"{dtype} {name} {d}"] = digest.hexdigest()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
