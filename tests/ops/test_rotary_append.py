"""rotary_append_: reference and CPU kernels against rotary and a plain copy, bit for bit."""

import pytest
import torch
from backends import Backend, backends_of
from hypothesis import given, settings
from hypothesis import strategies as st
from rotary_cases import KINDS, Step, step
from testkit import examples
from torch import Tensor

from rlir import _library
from rlir.errors import InputError
from rlir.ops import rotary, rotary_append_, rotary_append_reference

backends = backends_of(rotary_append_, rotary_append_reference)
native = backends_of(rotary_append_, rotary_append_reference, only=lambda op: not op.is_reference)


# Looking at values on CUDA would wait for the device: an assertion fails there.
on_cpu = backends_of(
    rotary_append_,
    rotary_append_reference,
    only=lambda op: not op.is_emulated and op.name != "cuda",
)


def run(op: Backend, case: Step, **options: bool) -> Tensor:
    """On a GPU the caches of a case are written by way of copies there."""
    if op.name != "cuda":
        with op.active():
            return op.function(*case, **options)
    there = Step(*(x.cuda() for x in case))
    out = op.function(*there, **options)
    case.cache_k.copy_(there.cache_k), case.cache_v.copy_(there.cache_v)
    return out.cpu()


def expected(case: Step, interleaved: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated q and both caches, a token at a time."""
    cache_k, cache_v = case.cache_k.clone(), case.cache_v.clone()
    out = torch.empty_like(case.q, dtype=case.cache_k.dtype)
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
    out = run(op, case, interleaved=interleaved)
    for name, got, right in zip(
        ("q", "cache_k", "cache_v"), (out, case.cache_k, case.cache_v), want, strict=True
    ):
        assert got.equal(right), name


@backends
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize(
    "sizes", [(2, 5, 4, 2, 64, 9), (1, 1, 1, 1, 2, 1), (3, 2, 3, 3, 30, 40), (0, 2, 2, 1, 8, 4)]
)
def test_is_rotary_and_a_copy(op: Backend, kind: str, interleaved: bool, sizes: tuple) -> None:
    """Rounded once, after the rotation, where the caches are of another dtype."""
    dtype, kept = KINDS[kind]
    check(op, step(*sizes, dtype, kept=kept), interleaved)


@native
@settings(max_examples=examples(30))
@given(
    b=st.integers(0, 3),
    t=st.integers(0, 4),
    heads=st.sampled_from([(1, 1), (4, 1), (4, 2), (0, 0), (3, 3)]),
    half=st.integers(1, 40),
    kind=st.sampled_from(sorted(KINDS)),
    interleaved=st.booleans(),
    layout=st.sampled_from(["fused", "one cache", "heads first", "step", "spread positions"]),
)
def test_any_layout(
    op: Backend,
    b: int,
    t: int,
    heads: tuple[int, int],
    half: int,
    kind: str,
    interleaved: bool,
    layout: str,
) -> None:
    d, (hq, hkv), capacity = 2 * half, heads, t + 3
    dtype, kept = KINDS[kind]
    case = step(b, t, hq, hkv, d, capacity, dtype, seed=half, kept=kept)
    if layout == "fused":
        whole = torch.cat([case.q, case.k, case.v], 2)
        q, k, v = whole.flatten(2).unflatten(2, (-1, d)).split([hq, hkv, hkv], 2)
        case = case._replace(q=q, k=k, v=v)
    elif layout == "one cache":
        both = torch.full((b, 2, capacity, hkv, d), 7.0, dtype=kept)
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
    run(op, case)
    written = torch.zeros(2, 9, dtype=torch.bool).scatter(1, case.positions, True)
    for cache in (case.cache_k, case.cache_v):
        assert cache.isnan().all(-1).all(-1).equal(~written)


@backends
def test_no_gradients(op: Backend) -> None:
    case = step(2, 3, 2, 1, 8, 9)
    q, k = case.q.requires_grad_(), case.k.requires_grad_()
    assert not run(op, case).requires_grad
    assert not case.cache_k.requires_grad
    assert q.grad is k.grad is None


@pytest.mark.skipif(_library.PATH is None, reason="the reference is forced")
def test_opcheck() -> None:
    op = torch.ops.rlir.rotary_append_.default
    for b, (dtype, kept) in zip((0, 2, 2), KINDS.values(), strict=True):
        torch.library.opcheck(op, (*step(b, 3, 4, 2, 8, 9, dtype, kept=kept), b == 2))


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
        ({"cache_k": torch.ones(2, 9, 1, 8).half()}, "cache_k must be torch.float32 as q is, got"),
        ({"cache_v": torch.ones(2, 9, 1, 8).bfloat16()}, "cache_v must be torch.float32 as q is"),
        (
            {"cache_k": torch.ones(2, 9, 1, 8).bfloat16()},
            "cache_v must be torch.bfloat16 as cache_k is, got torch.float32",
        ),
        ({"cache_k": torch.ones(2, 9, 2, 8)}, r"cache_k must be \[2, 9, 1, 8\], got shape"),
        ({"cache_v": torch.ones(2, 8, 1, 8)}, r"cache_v must be \[2, 9, 1, 8\], got shape"),
        ({"cache_v": torch.ones(2, 9, 1, 16)[..., ::2]}, "cache_v must be contiguous in D, got"),
        ({"cache_k": torch.ones(1, 9, 1, 8).expand(2, 9, 1, 8)}, "cache_k must have memory for"),
        ({"cos": torch.ones(2, 12, 8)}, r"cos must be \[2, 8\], got shape \(2, 12, 8\)"),
        ({"sin": torch.ones(11, 8)}, r"sin must be \[12, 8\], got shape \(11, 8\)"),
        ({"positions": torch.zeros(2, 3)}, "positions must be torch.int64, got torch.float32"),
        ({"positions": torch.zeros(3).long()}, r"positions must be \[2, 3\], got shape \(3,\)"),
    ],
)
def test_wrong_inputs_write_nothing(op: Backend, change: dict, line: str) -> None:
    refuses(op, change, line)


def refuses(op: Backend, change: dict, line: str) -> None:
    case = step(2, 3, 4, 1, 8, 9)._replace(**change)
    before = [case.cache_k.clone(), case.cache_v.clone()]
    with pytest.raises(InputError, match=f"^rotary_append_: {line}"):
        op(*case)
    assert case.cache_k.equal(before[0])
    assert case.cache_v.equal(before[1])


@on_cpu
@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"positions": torch.tensor([[0, 1, 2], [5, 9, 6]])}, "positions .* below 9, got 9"),
        ({"positions": torch.tensor([[0, 1, 2], [5, -1, 6]])}, "positions .* below 9, got -1"),
        ({"positions": torch.tensor([[0, 1, 2], [5, 8, 5]])}, "positions of a row .* got 5 twice"),
        ({"cos": torch.ones(2, 8), "sin": torch.ones(2, 8)}, "positions must .* below 2, got"),
    ],
)
def test_wrong_positions_write_nothing(op: Backend, change: dict, line: str) -> None:
    refuses(op, change, line)
