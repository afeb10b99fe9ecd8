"""rotary_append_: reference and CPU kernels against rotary and a plain copy, bit for bit."""

import pytest
import torch
from backends import Backend, backends_of
from hypothesis import given, settings
from hypothesis import strategies as st
from rotary_cases import DTYPES, Step, step
from testkit import examples
from torch import Tensor

from rlir import _library
from rlir.errors import InputError
from rlir.ops import rotary, rotary_append_, rotary_append_reference

backends = backends_of(rotary_append_, rotary_append_reference)
native = backends_of(rotary_append_, rotary_append_reference, only=lambda op: not op.is_reference)


def expected(case: Step, interleaved: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated q and both caches, a token at a time."""
    cache_k, cache_v = case.cache_k.clone(), case.cache_v.clone()
    out = torch.empty_like(case.q)
    for b in range(case.q.shape[0]):
        for t in range(case.q.shape[1]):
            p = int(case.positions[b, t])
            angles = (case.cos[p : p + 1], case.sin[p : p + 1])
            q, k = (x[b : b + 1, t : t + 1] for x in (case.q, case.k))
            out[b, t] = rotary(q, *angles, interleaved=interleaved)[0, 0]
            cache_k[b, p] = rotary(k, *angles, interleaved=interleaved)[0, 0]
            cache_v[b, p] = case.v[b, t]
    return out, cache_k, cache_v


def check(op: Backend, case: Step, interleaved: bool) -> None:
    with op.active():
        want = expected(case, interleaved)
        out = op.function(*case, interleaved=interleaved)
    for name, got, right in zip(
        ("q", "cache_k", "cache_v"), (out, case.cache_k, case.cache_v), want, strict=True
    ):
        assert got.equal(right), name


@backends
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize(
    "sizes", [(2, 5, 4, 2, 64, 9), (1, 1, 1, 1, 2, 1), (3, 2, 3, 3, 30, 40), (0, 2, 2, 1, 8, 4)]
)
def test_is_rotary_and_a_copy(
    op: Backend, dtype: torch.dtype, interleaved: bool, sizes: tuple
) -> None:
    check(op, step(*sizes, dtype), interleaved)


@native
@settings(max_examples=examples(30))
@given(
    b=st.integers(0, 3),
    t=st.integers(0, 4),
    heads=st.sampled_from([(1, 1), (4, 1), (4, 2), (0, 0), (3, 3)]),
    half=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
    interleaved=st.booleans(),
    layout=st.sampled_from(["fused", "one cache", "heads first", "step", "spread positions"]),
)
def test_any_layout(
    op: Backend,
    b: int,
    t: int,
    heads: tuple[int, int],
    half: int,
    dtype: torch.dtype,
    interleaved: bool,
    layout: str,
) -> None:
    d, (hq, hkv), capacity = 2 * half, heads, t + 3
    case = step(b, t, hq, hkv, d, capacity, dtype, seed=half)
    if layout == "fused":
        whole = torch.cat([case.q, case.k, case.v], 2)
        q, k, v = whole.flatten(2).unflatten(2, (-1, d)).split([hq, hkv, hkv], 2)
        case = case._replace(q=q, k=k, v=v)
    elif layout == "one cache":
        both = torch.full((b, 2, capacity, hkv, d), 7.0, dtype=dtype)
        case = case._replace(cache_k=both[:, 0], cache_v=both[:, 1])
    elif layout == "heads first":
        case = case._replace(
            **{
                name: getattr(case, name).transpose(1, 2).contiguous().transpose(1, 2)
                for name in ("q", "k", "v", "cache_k", "cache_v")
            }
        )
    elif layout == "step":
        case = case._replace(q=torch.stack([case.q, case.q], -1)[..., 0])
    else:
        case = case._replace(positions=torch.stack([case.positions] * 2, -1)[..., 0])
    check(op, case, interleaved)


@backends
def test_one_token_for_all_rows(op: Backend) -> None:
    case = step(3, 2, 2, 2, 8, 5)
    one = {name: getattr(case, name)[:1].expand(3, 2, 2, 8) for name in ("q", "k", "v")}
    check(op, case._replace(**one), False)


@backends
def test_a_float64_cache_runs_the_reference(op: Backend) -> None:
    case = Step(*(x.double() if x.is_floating_point() else x for x in step(2, 3, 2, 1, 6, 5)))
    check(op, case, True)


@backends
def test_slots_that_are_not_written_keep_their_bits(op: Backend) -> None:
    case = step(2, 3, 2, 1, 8, 9)
    case.cache_k.fill_(torch.nan), case.cache_v.fill_(torch.nan)
    op(*case)
    written = torch.zeros(2, 9, dtype=torch.bool).scatter(1, case.positions, True)
    for cache in (case.cache_k, case.cache_v):
        assert cache.isnan().all(-1).all(-1).equal(~written)


@backends
def test_no_gradients(op: Backend) -> None:
    case = step(2, 3, 2, 1, 8, 9)
    q, k = case.q.requires_grad_(), case.k.requires_grad_()
    assert not op(*case).requires_grad
    assert not case.cache_k.requires_grad
    assert q.grad is k.grad is None


@pytest.mark.skipif(_library.PATH is None, reason="the reference is forced")
def test_opcheck() -> None:
    op = torch.ops.rlir.rotary_append_.default
    for b, dtype in ((0, torch.float32), (2, torch.bfloat16)):
        torch.library.opcheck(op, (*step(b, 3, 4, 2, 8, 9, dtype), b == 2))


def test_compiles_once_for_all_sizes() -> None:
    """Writes are seen outside of the compiled function."""

    def run(*case: Tensor) -> Tensor:
        return rotary_append_(case[0] * 2, *case[1:]) + case[5].sum()

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True, dynamic=True)
    for t, stance in ((3, "default"), (6, "fail_on_recompile")):
        ours, theirs = (step(2, t, 4, 2, 10, t + 6) for _ in range(2))
        with torch.compiler.set_stance(stance):
            got = compiled(*ours)
        assert got.equal(run(*theirs))
        assert all(a.equal(b) for a, b in zip(ours, theirs, strict=True))


@backends
@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"q": torch.ones(2, 3, 4)}, r"q must be \[B, T, H, D\] with D even, got shape"),
        ({"k": torch.ones(2, 3, 1, 7)}, r"k must be \[B, T, H, D\] with D even, got shape"),
        ({"k": torch.ones(2, 2, 1, 8)}, r"k must be \[2, 3, 1, 8\], got shape \(2, 2, 1, 8\)"),
        ({"v": torch.ones(2, 3, 2, 8)}, r"v must be \[2, 3, 1, 8\], got shape \(2, 3, 2, 8\)"),
        ({"v": torch.ones(2, 3, 1, 8).bfloat16()}, "v must be torch.float32 as q is, got"),
        ({"cache_k": torch.ones(2, 9, 2, 8)}, r"cache_k must be \[2, 9, 1, 8\], got shape"),
        ({"cache_v": torch.ones(2, 8, 1, 8)}, r"cache_v must be \[2, 9, 1, 8\], got shape"),
        ({"cache_v": torch.ones(2, 9, 1, 16)[..., ::2]}, "cache_v must be contiguous in D, got"),
        ({"cache_k": torch.ones(1, 9, 1, 8).expand(2, 9, 1, 8)}, "cache_k must have memory for"),
        ({"cos": torch.ones(2, 12, 8)}, r"cos must be \[2, 8\], got shape \(2, 12, 8\)"),
        ({"sin": torch.ones(11, 8)}, r"sin must be \[12, 8\], got shape \(11, 8\)"),
        ({"positions": torch.zeros(2, 3)}, "positions must be torch.int64, got torch.float32"),
        ({"positions": torch.zeros(3).long()}, r"positions must be \[2, 3\], got shape \(3,\)"),
        ({"positions": torch.tensor([[0, 1, 2], [5, 9, 6]])}, "positions .* below 9, got 9"),
        ({"positions": torch.tensor([[0, 1, 2], [5, -1, 6]])}, "positions .* below 9, got -1"),
        ({"positions": torch.tensor([[0, 1, 2], [5, 8, 5]])}, "positions of a row .* got 5 twice"),
        ({"cos": torch.ones(2, 8), "sin": torch.ones(2, 8)}, "positions must .* below 2, got"),
    ],
)
def test_wrong_inputs_write_nothing(op: Backend, change: dict, line: str) -> None:
    case = step(2, 3, 4, 1, 8, 9)._replace(**change)
    before = [case.cache_k.clone(), case.cache_v.clone()]
    with pytest.raises(InputError, match=f"^rotary_append_: {line}"):
        op(*case)
    assert case.cache_k.equal(before[0])
    assert case.cache_v.equal(before[1])
