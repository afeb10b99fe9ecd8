"""group_decode_attention: reference and kernels against torch on copied prefixes; bits.

A long file: a step's inputs, their edges, and four promises of bits.
"""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from attention_cases import (
    DTYPES,
    FLOAT,
    MASKS,
    assert_2x,
    jittered,
    masks,
    sdpa,
)
from backends import Backend, backends_of, instruction_sets
from hypothesis import given, settings
from hypothesis import strategies as st
from row_cases import normal
from test_masks import schedule, stand_ins
from testkit import FULL, examples
from torch import Tensor

from rlir import _library
from rlir.errors import InputError
from rlir.ops import (
    Mask,
    causal,
    diagonal,
    group_decode_attention,
    group_decode_attention_reference,
    video_attention,
    visible,
)

CPU = Backend(f"cpu-{instruction_sets()[-1]}", group_decode_attention)
CAUSAL = causal()
both = (group_decode_attention, group_decode_attention_reference)
backends = backends_of(*both)
native = backends_of(*both, only=lambda op: not op.is_reference)
quick = backends_of(*both, only=lambda op: op.is_reference or op == CPU)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
all_masks = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
needs_library = pytest.mark.skipif(_library.PATH is None, reason="the reference is forced")


@dataclass
class Step:
    """A decoding step of B groups of ``size`` rollouts."""

    q: Tensor
    prefix_k: Tensor
    prefix_v: Tensor
    suffix_k: Tensor
    suffix_v: Tensor
    prefix_lengths: Tensor
    suffix_lengths: Tensor
    size: int
    mask: Mask = CAUSAL
    q_positions: Tensor | None = None
    scale: float | None = None

    def run(self, op: Any) -> Tensor:
        return op(
            *(self.q, self.prefix_k, self.prefix_v, self.suffix_k, self.suffix_v),
            prefix_lengths=self.prefix_lengths,
            suffix_lengths=self.suffix_lengths,
            group_size=self.size,
            mask=self.mask,
            q_positions=self.q_positions,
            scale=self.scale,
        )

    def of_rollout(self, n: int) -> tuple[Tensor, Tensor, Tensor]:
        """k and v [1, T, Hkv, D] of a rollout's stream and its queries' positions [Tq]."""
        b, tq = n // self.size, self.q.shape[1]
        p, s = int(self.prefix_lengths[b]), int(self.suffix_lengths[n])
        k, v = (
            torch.cat([prefix[b, :p], suffix[n, :s]])[None]
            for prefix, suffix in ((self.prefix_k, self.suffix_k), (self.prefix_v, self.suffix_v))
        )
        positions = torch.arange(p + s - tq, p + s)
        if self.q_positions is not None:
            positions = self.q_positions.expand(len(self.q), tq)[n]
        return k, v, positions


def step(
    b: int,
    size: int,
    tq: int,
    p: int,
    s: int,
    heads: tuple[int, int] = (4, 2),
    d: int = 32,
    dtype: torch.dtype = FLOAT,
    seed: int = 0,
    **options: Any,
) -> Step:
    """Lengths are those of the tensors, or random ones if ``ragged``."""
    prefix_lengths, suffix_lengths = torch.full((b,), p), torch.full((b * size,), s)
    if options.pop("ragged", False):
        g = torch.Generator().manual_seed(seed)
        prefix_lengths = torch.randint(0, p + 1, (b,), generator=g)
        suffix_lengths = torch.randint(0, s + 1, (b * size,), generator=g)
    hq, hkv = heads
    return Step(
        normal(b * size, tq, hq, d, dtype=dtype, seed=seed),
        *(normal(b, p, hkv, d, dtype=dtype, seed=seed + i) for i in (1, 2)),
        *(normal(b * size, s, hkv, d, dtype=dtype, seed=seed + i) for i in (3, 4)),
        *(prefix_lengths, suffix_lengths, size),
        **options,
    )


def plain(x: Step) -> Tensor:
    """torch's attention, a rollout at a time, in q's dtype. Heads that share a key head are queries
    of it: of two rows, torch sums a product in an order that is twice as good as of eight.
    """
    out = torch.empty_like(x.q)
    tq, (hq, hkv) = x.q.shape[1], (x.q.shape[2], x.prefix_k.shape[2])
    for n in range(len(x.q)):
        k, v, positions = x.of_rollout(n)
        seen = visible(x.mask, positions, k.shape[1]).repeat(hq // hkv, 1)
        q = x.q[n].unflatten(1, (hkv, -1)).movedim(2, 0).flatten(0, 1)
        found = sdpa(q[None], k, v, seen[None], x.scale)[0][0]
        out[n] = found.unflatten(0, (hq // hkv, tq)).movedim(0, 2).flatten(1, 2)
    return out


def widened(x: Step, jitter: bool) -> Step:
    names = ("q", "prefix_k", "prefix_v", "suffix_k", "suffix_v")
    tensors = [getattr(x, name) for name in names]
    wide = jittered(*tensors) if jitter else [t.double() for t in tensors]
    return replace(x, **dict(zip(names, wide, strict=True)))


def check_against_float64(op: Any, *cases: Step, few: bool = False) -> None:
    assert_2x(
        [[x.run(op)] for x in cases],
        [[plain(x)] for x in cases],
        [[plain(widened(x, False))] for x in cases],
        [[plain(widened(x, True))] for x in cases],
        ("out",),
        few,
    )


# --- Values --------------------------------------------------------------------------------------


@backends
@dtypes
@all_masks
@pytest.mark.parametrize("queries", [1, 12])
def test_matches_float64(op: Backend, dtype: torch.dtype, mask: Mask, queries: int) -> None:
    check_against_float64(op, step(2, 3, queries, 137, 45, dtype=dtype, mask=mask))


@backends
@dtypes
@pytest.mark.parametrize(
    ("heads", "d"), [((1, 1), 64), ((6, 2), 64), ((3, 3), 32), ((8, 1), 128), ((5, 1), 32)]
)
def test_heads_and_sizes(op: Backend, dtype: torch.dtype, heads: tuple, d: int) -> None:
    check_against_float64(op, step(1, 4, 2, 140, 20, heads, d, dtype, scale=0.3))


@backends
@pytest.mark.parametrize(
    ("b", "size", "tq", "p", "s"),
    [
        (0, 4, 1, 9, 9),
        (2, 1, 1, 30, 5),
        (2, 3, 1, 0, 40),
        (2, 3, 2, 40, 0),
        (2, 2, 0, 9, 9),
        (1, 2, 3, 0, 0),
    ],
)
def test_edges(op: Backend, b: int, size: int, tq: int, p: int, s: int) -> None:
    """No groups, groups of one, no prefix, no suffix, no queries, nothing at all."""
    x = step(b, size, tq, p, s)
    assert x.run(op).shape == x.q.shape
    check_against_float64(op, x, few=True)


@quick
@settings(max_examples=examples(30), derandomize=not FULL)
@given(data=st.data())
def test_anything(op: Backend, data: st.DataObject) -> None:
    b, size, tq = (data.draw(st.integers(0, n)) for n in (2, 4, 12))
    size = max(size, 1)
    p, s = (data.draw(st.integers(0, n)) for n in (280, 90))
    hkv, ratio = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 5))
    dtype, d = data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from([32, 64, 128]))
    options: dict[str, Any] = {"mask": data.draw(masks()), "ragged": data.draw(st.booleans())}
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    shape = data.draw(st.sampled_from([None, (b * size, tq), (tq,)]))
    if shape is not None:
        options["q_positions"] = torch.randint(0, p + s + 3, shape, generator=g)
    heads = (hkv * ratio, hkv)
    count = max(1, 100 // max(b * size * tq, 5))
    check_against_float64(
        op,
        *(step(b, size, tq, p, s, heads, d, dtype, seed=i, **options) for i in range(count)),
        few=True,
    )


@backends
@dtypes
def test_what_nobody_sees_does_not_matter(op: Backend, dtype: torch.dtype) -> None:
    """Slots that are not written, at the ends of prefix and suffix and in the middle of a frame."""
    mask = diagonal(4, 6, 2, 5, context_frames=0)
    x = step(2, 3, 3, 140, 60, dtype=dtype, mask=mask, ragged=True)
    x.q_positions = x.prefix_lengths.repeat_interleave(3)[:, None] + torch.tensor([20, 3, 14])
    want = x.run(op)
    for b, length in enumerate(x.prefix_lengths):
        x.prefix_k[b, length:], x.prefix_v[b, length:] = torch.nan, torch.nan
    holes = 0
    for n, length in enumerate(x.suffix_lengths):
        k, _, positions = x.of_rollout(n)
        seen = visible(mask, positions, k.shape[1]).any(0)[x.prefix_lengths[n // 3] :]
        unseen = torch.ones(60, dtype=torch.bool)
        unseen[:length] = ~seen
        holes += int(unseen[: int(seen.nonzero().max())].sum()) if seen.any() else 0
        x.suffix_k[n, unseen], x.suffix_v[n, unseen] = torch.inf, torch.nan
    assert holes > 0
    assert x.run(op).equal(want)
    assert want.isfinite().all()


@backends
def test_a_query_that_sees_nothing(op: Backend) -> None:
    x = step(2, 2, 2, 9, 4)
    x.prefix_lengths[0], x.suffix_lengths[1], x.suffix_lengths[3] = 0, 0, 1
    out = x.run(op)
    assert out[1].eq(0).all(), "an empty stream"
    assert out[0].ne(0).any(-1).all()
    assert out[3, 0].ne(0).any(), "a stream of ten slots"
    x.mask, x.q_positions = causal(3), torch.tensor([40, 8])
    assert x.run(op)[:, 0].eq(0).all(), "behind a window that slid past the stream"


@backends
def test_no_gradients(op: Backend) -> None:
    x = step(1, 2, 1, 9, 4)
    x.q.requires_grad_(), x.prefix_k.requires_grad_()
    if not op.is_reference:
        assert not x.run(op).requires_grad


@native
@dtypes
@pytest.mark.parametrize("layout", ["heads first", "fused", "step", "one row", "cache"])
def test_strides_do_not_matter(op: Backend, dtype: torch.dtype, layout: str) -> None:
    x = step(2, 2, 3, 40, 40, (2, 2), dtype=dtype)
    names = ("q", "prefix_k", "prefix_v", "suffix_k", "suffix_v")
    tensors = {name: getattr(x, name) for name in names}
    if layout == "heads first":
        new = {n: t.transpose(1, 2).contiguous().transpose(1, 2) for n, t in tensors.items()}
    elif layout == "fused":
        new = {n: torch.cat([t, t, t], 2)[:, :, 2:4] for n, t in tensors.items()}
    elif layout == "step":
        new = {n: torch.stack([t, t * torch.nan], -1)[..., 0] for n, t in tensors.items()}
    elif layout == "one row":
        new = {n: t[:1].expand_as(t) for n, t in tensors.items()}
    else:  # longer than what is used
        new = {n: torch.cat([t, t * torch.nan], 1)[:, : t.shape[1]] for n, t in tensors.items()}
    plain_layout = {n: t.contiguous() for n, t in new.items()}
    assert replace(x, **new).run(op).equal(replace(x, **plain_layout).run(op))


def test_other_dtypes_and_head_sizes_run_the_reference() -> None:
    for options in ({"dtype": torch.float64}, {"dtype": torch.float16}, {"d": 260}):
        x = step(1, 2, 1, 9, 4, **options)
        assert x.run(group_decode_attention).equal(x.run(group_decode_attention_reference))


# --- The same bits -------------------------------------------------------------------------------


@native
@dtypes
@all_masks
def test_has_the_bits_of_the_training_forward(op: Backend, dtype: torch.dtype, mask: Mask) -> None:
    x = step(2, 3, 12, 137, 150, dtype=dtype, mask=mask, ragged=True)
    out = x.run(op)
    for n in range(len(x.q)):
        k, v, _ = x.of_rollout(n)
        with op.active():
            want = video_attention(x.q[n : n + 1], k, v, mask=mask)
        assert out[n : n + 1].equal(want), f"rollout {n}"


@native
@dtypes
@pytest.mark.parametrize("p", [0, 5, 128, 200])
def test_bits_do_not_depend_on_the_group(op: Backend, dtype: torch.dtype, p: int) -> None:
    """Alone, among others, with its prefix as part of the suffix, and a query at a time."""
    x = step(1, 5, 4, p, 70, (6, 2), dtype=dtype)
    x.suffix_lengths = torch.tensor([70, 3, 0, 69, 31])
    out = x.run(op)
    for n in (0, 3, 4):
        rows = slice(n, n + 1)
        alone = replace(
            x,
            q=x.q[rows],
            suffix_k=x.suffix_k[rows],
            suffix_v=x.suffix_v[rows],
            suffix_lengths=x.suffix_lengths[rows],
            size=1,
        )
        assert alone.run(op).equal(out[rows]), "a group of one"
        k, v, positions = x.of_rollout(n)
        for cut in (0, min(64, k.shape[1]), k.shape[1]):
            moved = replace(
                alone,
                prefix_k=k[:, :cut],
                prefix_v=v[:, :cut],
                suffix_k=k[:, cut:],
                suffix_v=v[:, cut:],
                prefix_lengths=torch.tensor([cut]),
                suffix_lengths=torch.tensor([k.shape[1] - cut]),
            )
            assert moved.run(op).equal(out[rows]), f"a prefix of {cut}"
        for i in range(4):
            one = replace(alone, q=x.q[rows, i : i + 1], q_positions=positions[i : i + 1])
            assert one.run(op).equal(out[rows, i : i + 1]), f"query {i} alone"


@native
@dtypes
@pytest.mark.parametrize("kind", ["far scores", "subnormal keys"])
def test_bits_do_not_depend_on_how_many_queries(op: Backend, dtype: torch.dtype, kind: str) -> None:
    """Weights from 1 down to an exact 0; keys below the normal numbers, which some builds flush."""
    x = step(1, 1, 6, 140, 20, (6, 2), dtype=dtype)
    if kind == "far scores":
        x.q *= 300.0
    else:
        x.q *= 2.0**120
        x.prefix_k *= 2.0**-126
        x.suffix_k *= 2.0**-126
    out = x.run(op)
    assert out.isfinite().all()
    _, _, positions = x.of_rollout(0)
    for i in range(6):
        one = replace(x, q=x.q[:, i : i + 1], q_positions=positions[i : i + 1])
        assert one.run(op).equal(out[:, i : i + 1]), f"query {i} alone"


@native
@dtypes
@pytest.mark.parametrize("queries", [1, 12])
@pytest.mark.parametrize("heads", [(6, 6), (10, 5), (16, 4)])
def test_bits_do_not_depend_on_heads_that_go_together(
    op: Backend, dtype: torch.dtype, queries: int, heads: tuple
) -> None:
    """A thread goes over a block for all key heads that lie beside each other."""
    x = step(3, 3, queries, 137, 290, heads, dtype=dtype, mask=causal(230), ragged=True)
    x.suffix_v[2, 5:80, ::2] = torch.inf  # some queries see these, and some do not
    names = ("prefix_k", "prefix_v", "suffix_k", "suffix_v")
    apart = {n: getattr(x, n).transpose(1, 2).contiguous().transpose(1, 2) for n in names}
    want = replace(x, **apart).run(op)
    assert torch.equal(x.run(op).nan_to_num(7.0), want.nan_to_num(7.0))
    assert want[:2].isfinite().all()


@native
@dtypes
@pytest.mark.parametrize("refresh", [False, True])
def test_diagonal_decoding_has_the_bits_of_the_trainer(
    op: Backend, dtype: torch.dtype, refresh: bool
) -> None:
    """Frames decoded step by step into a cache of NaN, then scored in one forward pass.

    With refresh, stand-ins become NaN again when they are replaced, and in the prompt they are NaN.
    """
    rows, columns, ahead, action = 4, 6, 2, 3
    mask = diagonal(rows, columns, ahead, action, refresh=refresh)
    image = rows * (columns + refresh) - refresh
    block, prompt = action + image, image
    total = prompt + 2 * block
    q = normal(2, total, 4, 32, dtype=dtype)
    k, v = (normal(2, total, 2, 32, dtype=dtype, seed=i) for i in (1, 2))
    prefix = [t[:1, :prompt] for t in (k, v)]
    replaced = sorted(stand_ins(rows, columns)) if refresh else []
    k[0, replaced], v[0, replaced] = torch.nan, torch.nan
    k[1, :prompt], v[1, :prompt] = k[0, :prompt], v[0, :prompt]
    with op.active():
        want = video_attention(q, k, v, mask=mask)[:, prompt:]
    cache_k, cache_v = (torch.full_like(k[:, prompt:], torch.nan) for _ in range(2))
    got = torch.full_like(want, torch.nan)
    last: list[int] = []  # of the frame before, fed with the actions
    for frame in range(2):
        steps = [[*last, *range(frame * block, frame * block + action)]]
        start = frame * block + action
        steps += [[start + slot for slot in fed] for fed in schedule(rows, columns, ahead, refresh)]
        last = [start + image - 1]
        for fed in steps:
            slots = torch.tensor(fed)
            cache_k[:, slots], cache_v[:, slots] = k[:, prompt + slots], v[:, prompt + slots]
            gone = [start + slot for slot in replaced if start + slot + 1 in fed]
            cache_k[:, gone], cache_v[:, gone] = torch.nan, torch.nan
            got[:, slots] = op(
                *(q[:, prompt + slots], *prefix, cache_k, cache_v),
                prefix_lengths=torch.tensor([prompt]),
                suffix_lengths=torch.tensor([max(fed) + 1] * 2),
                group_size=2,
                q_positions=prompt + slots,
                mask=mask,
            )
    done = torch.arange(2 * block) != last[0]
    assert got[:, done].equal(want[:, done])


# --- The operator --------------------------------------------------------------------------------


def raw(x: Step) -> tuple[Any, ...]:
    return (
        *(x.q, x.prefix_k, x.prefix_v, x.suffix_k, x.suffix_v),
        *(x.prefix_lengths, x.suffix_lengths, x.q_positions),
        *(x.mask.kind, x.mask.numbers, x.size, 0.3),
    )


@needs_library
@dtypes
def test_opcheck(dtype: torch.dtype) -> None:
    for b, positions in ((0, None), (2, torch.tensor([11, 3]))):
        x = step(b, 3, 2, 9, 7, dtype=dtype, mask=diagonal(2, 3, 1, 1), q_positions=positions)
        torch.library.opcheck(torch.ops.rlir.group_decode_attention.default, raw(x))


def test_compiles_once_for_all_sizes() -> None:
    def double(*tensors: Tensor) -> Tensor:
        q, *kept, prefix_lengths, suffix_lengths = tensors
        return group_decode_attention(
            *(q * 2, *kept),
            prefix_lengths=prefix_lengths,
            suffix_lengths=suffix_lengths,
            group_size=3,
        )

    compiled = torch.compile(double, backend="aot_eager", fullgraph=True, dynamic=True)
    for b, stance in ((2, "default"), (4, "fail_on_recompile")):
        x = step(b, 3, b + 1, 11 * b, 7 * b, (10, 5))
        tensors = raw(x)[:7]
        with torch.compiler.set_stance(stance):
            got = compiled(*tensors)
        assert got.equal(double(*tensors))


X = step(2, 3, 2, 9, 7)
LENGTHS = torch.full((6,), 7)


@backends
@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"mask": None}, r"mask must be causal\(\), frame_causal\(\) or .* got a NoneType"),
        ({"q": X.q[0]}, r"q must be \[B, T, Hq, D\], got shape \(2, 4, 32\)"),
        ({"size": 0}, "group_size must be an integer >= 1, got 0"),
        ({"size": 4}, "q must have a multiple of group_size 4 rows, got 6"),
        ({"size": 2}, r"prefix_k must be \[3, 9, 2, 32\], got shape \(2, 9, 2, 32\)"),
        ({"prefix_v": X.prefix_v[:, :8]}, r"prefix_v must be \[2, 9, 2, 32\], got shape"),
        ({"suffix_k": X.suffix_k[:2]}, r"suffix_k must be \[6, 7, 2, 32\], got shape"),
        ({"suffix_k": X.suffix_k[:, :, :1]}, r"suffix_k must be \[6, 7, 2, 32\], got shape"),
        ({"suffix_v": X.suffix_v[..., :8]}, r"suffix_v must be \[6, 7, 2, 32\], got shape"),
        ({"suffix_v": X.suffix_v.bfloat16()}, "suffix_v must be torch.float32 as q is, got"),
        ({"q": X.q[:, :, :3]}, "q must have a multiple of 2 heads, as prefix_k has, got 3"),
        ({"prefix_lengths": LENGTHS}, r"prefix_lengths must be \[2\], got shape \(6,\)"),
        ({"suffix_lengths": LENGTHS.int()}, "suffix_lengths must be torch.int64, got torch.int32"),
        ({"prefix_lengths": LENGTHS[:2] + 3}, "prefix_lengths must be from 0 to 9, got 10"),
        ({"suffix_lengths": LENGTHS - 8}, "suffix_lengths must be from 0 to 7, got -1"),
        ({"q_positions": LENGTHS}, r"q_positions must be \[2\], got shape \(6,\)"),
        ({"q_positions": torch.tensor([3, -1])}, "q_positions must be from 0 .* got -1"),
        ({"scale": float("inf")}, "scale must be finite and > 0, or None, got inf"),
    ],
)
def test_wrong_inputs(op: Backend, change: dict, line: str) -> None:
    if not op.is_reference and not op.name.startswith("cpu"):
        if "must be from 0" in line or "2147" in line:
            pytest.skip("a kernel cannot say which; tests/cudacheck looks")
        if op.name == "cuda" and "meta" in line:
            pytest.skip("the message names the device")
    with pytest.raises(InputError, match=f"^group_decode_attention: {line}") as error:
        replace(X, **change).run(op)
    assert "\n" not in str(error.value)
