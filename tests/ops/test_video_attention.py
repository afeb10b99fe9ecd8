"""video_attention: reference and kernels against torch's attention with a mask tensor; bits.

A long file: forward and backward, masks, lengths, positions, layouts.
"""

import math
from typing import Any

import pytest
import torch
from attention_cases import (
    DTYPES,
    FLOAT,
    MASKS,
    NAMES,
    Inputs,
    check_against_float64,
    inputs,
    masks,
    outputs,
    seen_by,
)
from backends import Backend, backends_of, instruction_sets, needs_amx, threads
from hypothesis import given, settings
from hypothesis import strategies as st
from isas import assert_same_bits_everywhere
from testkit import FULL, examples
from torch import Tensor

from rlir import _library
from rlir.errors import InputError
from rlir.ops import (
    Mask,
    causal,
    diagonal,
    frame_causal,
    video_attention,
    video_attention_reference,
)

CPU = Backend(f"cpu-{instruction_sets()[-1]}", video_attention)
backends = backends_of(video_attention, video_attention_reference)
native = backends_of(
    video_attention, video_attention_reference, only=lambda op: not op.is_reference
)
quick = backends_of(
    video_attention, video_attention_reference, only=lambda op: op.is_reference or op == CPU
)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
all_masks = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
needs_library = pytest.mark.skipif(_library.PATH is None, reason="the reference is forced")


# --- Values and gradients ------------------------------------------------------------------------


@backends
@dtypes
@all_masks
def test_matches_float64(op: Backend, dtype: torch.dtype, mask: Mask) -> None:
    check_against_float64(op, inputs(2, 131, 131, (4, 2), 32, dtype, mask=mask))


@backends
@dtypes
@pytest.mark.parametrize(
    ("heads", "d"), [((1, 1), 64), ((6, 2), 64), ((3, 3), 32), ((8, 1), 128), ((5, 1), 32)]
)
def test_heads_and_sizes(op: Backend, dtype: torch.dtype, heads: tuple, d: int) -> None:
    mask = frame_causal(30, 3)
    check_against_float64(op, inputs(1, 40, 170, heads, d, dtype, mask=mask, scale=0.3))


@backends_of(
    video_attention,
    video_attention_reference,
    only=lambda op: not op.is_emulated and op.name != "cuda",
)
@dtypes
@pytest.mark.parametrize("d", [1, 7, 24, 80, 250, 256])
def test_odd_head_sizes_on_the_cpu(op: Backend, dtype: torch.dtype, d: int) -> None:
    x = inputs(2, 20, 140, (4, 2), d, dtype, mask=causal())
    check_against_float64(op, x, few=op.is_reference)


@quick
@settings(max_examples=examples(30), derandomize=not FULL)
@given(data=st.data())
def test_anything(op: Backend, data: st.DataObject) -> None:
    b, tq, tk = (data.draw(st.integers(0, n)) for n in (3, 50, 300))
    hkv, ratio = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 5))
    dtype, d = data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from([32, 64, 128]))
    options: dict[str, Any] = {"mask": data.draw(masks())}
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    for name, longest in (("q_lengths", tq), ("k_lengths", tk)):
        if data.draw(st.booleans()):
            options[name] = torch.randint(0, longest + 1, (b,), generator=g)
    shape = data.draw(st.sampled_from([None, (b, tq), (tq,)]))
    if shape is not None:
        options["q_positions"] = torch.randint(0, tk + 3, shape, generator=g)
    if data.draw(st.booleans()):
        options["scale"] = data.draw(st.sampled_from([0.5, 1e-3]))
    cases = [
        inputs(b, tq, tk, (hkv * ratio, hkv), d, dtype, seed=i, **options)
        for i in range(max(1, 100 // max(b * tq, 5)))
    ]
    check_against_float64(op, *cases, few=True)


def test_gradcheck() -> None:
    for mask in (causal(3), frame_causal(3, 1), diagonal(2, 2, 1, 1)):
        x = inputs(2, 4, 7, (2, 1), 3, torch.float64)

        def call(q: Tensor, k: Tensor, v: Tensor, mask: Mask = mask) -> list[Tensor]:
            lengths = {"q_lengths": torch.tensor([4, 3]), "k_lengths": torch.tensor([7, 2])}
            both = video_attention(q, k, v, mask=mask, **lengths, return_lse=True)
            return [y.where(y.isfinite(), 0) for y in both]

        assert torch.autograd.gradcheck(call, [t.requires_grad_() for t in (x.q, x.k, x.v)])


@backends
@dtypes
def test_each_output_alone_has_its_gradient(op: Backend, dtype: torch.dtype) -> None:
    x = inputs(2, 20, 45, dtype=dtype, mask=causal())
    both = outputs(op, x)
    parts = []
    for index, grad in enumerate((x.d_out, x.d_lse)):
        leaves = [t.clone().requires_grad_() for t in (x.q, x.k, x.v)]
        with op.active():
            out = op.function(*leaves, mask=causal(), return_lse=True)[index]
            parts.append(torch.autograd.grad(out, leaves, grad, materialize_grads=True))
    assert parts[1][2].eq(0).all(), "lse does not depend on v"
    tolerance = 1e-5 if dtype == FLOAT else 2e-2
    for name, whole, a, b in zip(NAMES[2:], both[2:], *parts, strict=True):
        torch.testing.assert_close(
            whole.float(), a.float() + b.float(), rtol=tolerance, atol=tolerance, msg=name
        )


@backends
def test_only_what_is_needed_gets_a_gradient(op: Backend) -> None:
    x = inputs(2, 20, 45, mask=causal())
    whole = outputs(op, x)[2:]
    for needed in range(3):
        leaves = [t.clone() for t in (x.q, x.k, x.v)]
        leaves[needed].requires_grad_()
        with op.active():
            out, lse = op.function(*leaves, mask=causal(), return_lse=True)
            ((out * x.d_out).sum() + (lse * x.d_lse).sum()).backward()
        torch.testing.assert_close(leaves[needed].grad, whole[needed], rtol=1e-6, atol=1e-6)
        assert all(leaf.grad is None for i, leaf in enumerate(leaves) if i != needed)


@backends
@dtypes
def test_gradients_without_strides(op: Backend, dtype: torch.dtype) -> None:
    x = inputs(2, 9, 40, dtype=dtype, mask=causal())
    results = []
    for expand in (True, False):
        leaves = [t.clone().requires_grad_() for t in (x.q, x.k, x.v)]
        with op.active():
            both = op.function(*leaves, mask=causal(), return_lse=True)
            grads = [torch.ones((), dtype=y.dtype).expand(y.shape) for y in both]
            grads = grads if expand else [g.contiguous() for g in grads]
            results.append(torch.autograd.grad(both, leaves, grads))
    assert all(a.equal(b) for a, b in zip(*results, strict=True))


# --- What is not there ---------------------------------------------------------------------------


@backends
@pytest.mark.parametrize(
    "sizes", [(0, 3, 4), (2, 0, 4), (2, 3, 0), (2, 0, 0)], ids=lambda s: "x".join(map(str, s))
)
def test_empty(op: Backend, sizes: tuple[int, int, int]) -> None:
    for mask in (causal(), diagonal(2, 2, 1, 1)):
        x = inputs(*sizes, mask=mask)
        out, lse, *grads = outputs(op, x)
        assert out.shape == x.q.shape
        assert lse.shape == x.q.shape[:3]
        assert out.eq(0).all()
        assert all(g.eq(0).all() for g in grads)
        assert op(x.q, x.k, x.v, mask=mask, return_lse=True)[1].isneginf().all()


@backends
@dtypes
def test_lengths(op: Backend, dtype: torch.dtype) -> None:
    """Rows that are shorter, empty, or have more queries than keys; NaN beyond their ends."""
    options = {
        "mask": causal(),
        "q_lengths": torch.tensor([30, 12, 0, 9, 30]),
        "k_lengths": torch.tensor([150, 40, 70, 0, 11]),
    }
    x = inputs(5, 30, 150, dtype=dtype, **options)
    check_against_float64(op, x, few=True)
    clean = outputs(op, x)
    for row, (q, k) in enumerate(zip(options["q_lengths"], options["k_lengths"], strict=True)):
        x.q[row, q:] = x.k[row, k:] = x.v[row, k:] = torch.nan
        x.d_out[row, q:] = x.d_lse[row, q:] = torch.nan
        alone = inputs(1, int(q), int(k), dtype=dtype, mask=causal())
        alone.q, alone.k, alone.v = (
            x.q[row : row + 1, :q],
            *(t[row : row + 1, :k] for t in (x.k, x.v)),
        )
        if not op.is_reference:
            got = op(alone.q, alone.k, alone.v, mask=causal(), return_lse=True)
            assert got[0].equal(clean[0][row : row + 1, :q])
    out, lse = op(x.q, x.k, x.v, **options, return_lse=True)
    assert out.equal(clean[0])
    seen = seen_by(x).any(-1)
    assert lse.isneginf().equal(~seen[..., None].expand_as(lse))
    assert seen[4].sum() == 11, "the first 19 queries of the last row come before its keys"
    leaves = [t.clone().requires_grad_() for t in (x.q, x.k, x.v)]
    with op.active():
        both = op.function(*leaves, **options, return_lse=True)
        grads = torch.autograd.grad(both, leaves, [x.d_out, x.d_lse])
    for got, want in zip(grads, clean[2:], strict=True):
        assert got.equal(want)


@backends
@dtypes
def test_a_query_that_sees_nothing(op: Backend, dtype: torch.dtype) -> None:
    """Behind a window that slid past the keys."""
    options = {"mask": causal(4), "q_positions": torch.tensor([14, 0, 10, 13, 2**31 - 2])}
    x = inputs(2, 5, 11, dtype=dtype, **options)
    out, _, dq, *_ = outputs(op, x)
    dead = torch.tensor([True, False, False, False, True])
    assert out[:, dead].eq(0).all()
    assert dq[:, dead].eq(0).all()
    assert out[:, ~dead].ne(0).any(-1).all()
    assert op(x.q, x.k, x.v, **options, return_lse=True)[1][:, dead].isneginf().all()
    check_against_float64(op, x, few=True)


@backends
@dtypes
@all_masks
def test_what_nobody_sees_does_not_matter(op: Backend, dtype: torch.dtype, mask: Mask) -> None:
    """Slots of a cache that are not written yet, in the middle of a frame."""
    g = torch.Generator().manual_seed(0)
    positions = torch.stack([torch.randperm(160, generator=g)[:3] for _ in range(2)])
    x = inputs(2, 3, 160, dtype=dtype, mask=mask, q_positions=positions)
    clean = outputs(op, x)
    unseen = ~seen_by(x).any(1)
    assert unseen.any()
    x.k[unseen] = torch.nan
    x.v[unseen] = torch.inf
    for name, got, want in zip(NAMES, outputs(op, x), clean, strict=True):
        assert got.equal(want), name
    for grad in clean[3:]:
        assert grad[unseen].eq(0).all()


@backends
@dtypes
def test_stand_ins_are_not_seen_by_later_frames(op: Backend, dtype: torch.dtype) -> None:
    """Nor in the context, in blocks of keys of which queries see the rest."""
    mask = diagonal(4, 6, 2, 5, refresh=True)
    x = inputs(1, 40, 400, dtype=dtype, mask=mask)
    clean = outputs(op, x)
    unseen = ~seen_by(x).any(1)
    frames = [frame * (5 + 27) for frame in range(11)]  # 27 slots of an image, 5 of actions
    stand_ins = [start + slot for start in frames for slot in (5, 12, 19)]
    assert unseen[0].nonzero().flatten().tolist() == stand_ins
    x.k[unseen] = x.v[unseen] = torch.nan
    for name, got, want in zip(NAMES, outputs(op, x), clean, strict=True):
        assert got.equal(want), name
    for grad in clean[3:]:
        assert grad[unseen].eq(0).all()
    check_against_float64(op, inputs(1, 40, 400, dtype=dtype, mask=mask))


@backends
@dtypes
def test_extreme_scores(op: Backend, dtype: torch.dtype) -> None:
    """One key takes all; the rest is too far below to be seen in the sum."""
    x = inputs(1, 5, 140, dtype=dtype, mask=causal())
    x.q[:] = 1
    x.k[:] = -3
    x.k[0, 70] = 30
    out = op(x.q, x.k, x.v, mask=causal())
    assert out[0, :, 0].equal(x.v[0, 70, 0].expand(5, -1))
    x.k[0, 70] = -3
    check_against_float64(op, x, few=True)


@backends
def test_infinite_and_undefined_values(op: Backend) -> None:
    """They stay in their query, and in their channel of the heads that read them."""
    x = inputs(1, 40, 40, mask=causal())
    want = op(x.q, x.k, x.v, mask=causal())
    x.q[0, 20] = torch.nan
    x.v[0, 30, 0, 5] = torch.inf
    got = op(x.q, x.k, x.v, mask=causal())
    assert got[0, 20].isnan().all()
    assert not got[0, 30:, :2, 5].isfinite().any()
    got[0, 20], want[0, 20] = 0, 0
    got[0, :, :2, 5], want[0, :, :2, 5] = 0, 0
    assert got.equal(want)


# --- Layouts -------------------------------------------------------------------------------------


@native
@dtypes
@pytest.mark.parametrize("layout", ["heads first", "fused", "step", "odd", "one row", "one head"])
def test_strides_do_not_matter(op: Backend, dtype: torch.dtype, layout: str) -> None:
    x = inputs(2, 45, 45, (4, 4), 32, dtype, mask=causal())
    tensors = [x.q, x.k, x.v]
    if layout == "heads first":
        tensors = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in tensors]
    elif layout == "fused":
        whole = torch.cat([t.flatten(2) for t in tensors], 2)
        tensors = [t.unflatten(2, (4, 32)) for t in whole.split([128, 128, 128], 2)]
    elif layout == "step":
        tensors = [torch.stack([t, torch.full_like(t, torch.nan)], -1)[..., 0] for t in tensors]
    elif layout == "odd":
        tensors = [torch.cat([t[..., :1], t], -1)[..., 1:] for t in tensors]
    elif layout == "one row":
        tensors = [t[:1].expand(2, -1, -1, -1) for t in tensors]
    else:
        tensors = [t[:, :, :1].expand(-1, -1, 4, -1) for t in tensors]
    assert layout == "one row" or not all(t.is_contiguous() for t in tensors)
    y = Inputs(*tensors, x.d_out.transpose(0, 1).contiguous().transpose(0, 1), x.d_lse, x.options)
    plain = Inputs(*(t.contiguous() for t in tensors), x.d_out, x.d_lse, x.options)
    for name, got, want in zip(NAMES, outputs(op, y), outputs(op, plain), strict=True):
        assert got.equal(want), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_dtypes_run_the_reference(dtype: torch.dtype) -> None:
    x = inputs(1, 5, 9, d=24, dtype=dtype)
    got = video_attention(x.q, x.k, x.v, mask=causal())
    assert got.equal(video_attention_reference(x.q, x.k, x.v, mask=causal()))
    assert got.dtype == dtype


def test_other_head_sizes_run_the_reference() -> None:
    x = inputs(1, 5, 9, d=260)
    got = video_attention(x.q, x.k, x.v, mask=causal())
    assert got.equal(video_attention_reference(x.q, x.k, x.v, mask=causal()))


# --- The same bits -------------------------------------------------------------------------------


@native
@dtypes
@all_masks
def test_bits_do_not_depend_on_what_comes_together(
    op: Backend, dtype: torch.dtype, mask: Mask
) -> None:
    """Rows of a batch, chunks and any set of queries, keys beyond, heads."""
    t = 290
    x = inputs(2, t, t, (4, 2), 32, dtype)
    whole = op(x.q, x.k, x.v, mask=mask, return_lse=True)

    def same(part: tuple[Tensor, Tensor], *where: Any) -> None:
        for got, want in zip(part, whole, strict=True):
            assert got.equal(want[where])

    k, v = x.k[1:], x.v[1:]
    same(op(x.q[1:], k, v, mask=mask, return_lse=True), slice(1, 2))
    g = torch.Generator().manual_seed(0)
    for some in (torch.arange(130, 137), torch.tensor([289]), torch.randperm(t, generator=g)[:20]):
        part = op(x.q[1:, some], k, v, mask=mask, q_positions=some, return_lse=True)
        same(part, slice(1, 2), some)
    if mask.kind != "frame_causal":  # a frame that has begun sees its end
        for end in (100, 256, 257):
            lengths = torch.tensor([end, end])
            part = op(x.q[:, :end], x.k, x.v, mask=mask, k_lengths=lengths, return_lse=True)
            same(part, slice(None), slice(0, end))
    same(
        op(x.q[:, :, 2:], x.k[:, :, 1:], x.v[:, :, 1:], mask=mask, return_lse=True),
        *(slice(None), slice(None), slice(2, 4)),
    )


@native
@settings(max_examples=examples(15), derandomize=not FULL)
@given(mask=masks(), cut=st.integers(0, 200), dtype=st.sampled_from(DTYPES))
def test_bits_of_chunks(op: Backend, mask: Mask, cut: int, dtype: torch.dtype) -> None:
    x = inputs(1, 200, 200, (2, 1), 32, dtype)
    whole = op(x.q, x.k, x.v, mask=mask)
    positions = torch.arange(200)
    parts = [
        op(x.q[:, rows], x.k, x.v, mask=mask, q_positions=positions[rows])
        for rows in (slice(0, cut), slice(cut, 200))
    ]
    assert torch.cat(parts, 1).equal(whole)


@needs_library
def test_bits_do_not_depend_on_instruction_set_or_threads() -> None:
    """With group_decode_attention and group_attention."""
    assert_same_bits_everywhere("attention_cases.py", "torch.bfloat16 ")


@needs_amx
@dtypes
def test_bits_on_amx_do_not_depend_on_threads(dtype: torch.dtype) -> None:
    """With the gradients. They are the others' in float32 alone, which shows in float32 results."""
    x = inputs(1, 90, 150, (2, 1), 32, dtype, mask=MASKS["diagonal"])
    found = []
    for isa in ("avx512_bf16", "amx", "amx"):
        with threads(len(found) + 1):
            found.append(outputs(Backend(f"cpu-{isa}", video_attention), x))
    others, two, three = found
    assert all(a.equal(b) for a, b in zip(two, three, strict=True))
    same = {of: a.equal(b) for of, a, b in zip(NAMES, two, others, strict=True)}
    assert all(same.values()) if dtype == FLOAT else not same["lse"]


# --- The operator --------------------------------------------------------------------------------


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
def test_opcheck(dtype: torch.dtype) -> None:
    forward = torch.ops.rlir.video_attention.default
    backward = torch.ops.rlir.video_attention_backward.default
    for b, mask in ((0, causal(3)), (2, diagonal(2, 3, 1, 1))):
        x = inputs(b, 5, 11, dtype=dtype)
        lengths = (torch.arange(5).expand(b, 5), torch.full((b,), 4), torch.full((b,), 9))
        rest = (mask.kind, mask.numbers, 0.3)
        leaves = [t.clone().requires_grad_() for t in (x.q, x.k, x.v)]
        torch.library.opcheck(forward, (*leaves, *lengths, *rest))
        torch.library.opcheck(forward, (x.q, x.k, x.v, None, None, None, *rest))
        both = forward(x.q, x.k, x.v, *lengths, *rest)
        for d_lse in (None, x.d_lse):
            saved = (x.q, x.k, x.v, *both, *lengths, *rest)
            torch.library.opcheck(backward, (x.d_out, d_lse, *saved))


def test_compiles_once_for_all_sizes() -> None:
    def double(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        mask = frame_causal(6, 2)
        return video_attention(q * 2, k, v, mask=mask, k_lengths=lengths, return_lse=True)

    compiled = torch.compile(double, backend="aot_eager", fullgraph=True, dynamic=True)
    for t, stance in ((7, "default"), (12, "fail_on_recompile")):
        x = inputs(2, t, t + 6)
        lengths = torch.tensor([t + 6, t + 2])
        results = []
        for function in (compiled, double):
            leaves = [y.clone().requires_grad_() for y in (x.q, x.k, x.v)]
            with torch.compiler.set_stance(stance if function is compiled else "default"):
                both = function(*leaves, lengths)
                results.append([*both, *torch.autograd.grad(both, leaves, (x.d_out, x.d_lse))])
        assert all(a.equal(b) for a, b in zip(*results, strict=True))


Q, K = torch.ones(2, 3, 4, 32), torch.ones(2, 5, 2, 32)
FIVE = torch.full((2,), 5)


@backends
@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"mask": "causal"}, r"mask must be causal\(\), frame_causal\(\) or .* got a str"),
        ({"mask": torch.ones(3, 5).bool()}, r"mask must be causal\(\), .* got a Tensor"),
        ({"q": Q[0]}, r"q must be \[B, T, Hq, D\], got shape \(3, 4, 32\)"),
        ({"k": K[..., 0]}, r"k must be \[B, T, Hkv, D\], got shape \(2, 5, 2\)"),
        ({"k": K[:1]}, r"k must be \[2, 5, 2, 32\], got shape \(1, 5, 2, 32\)"),
        ({"v": K[:, :4]}, r"v must be \[2, 5, 2, 32\], got shape \(2, 4, 2, 32\)"),
        ({"v": K.bfloat16()}, "v must be torch.float32 as q is, got torch.bfloat16"),
        ({"q": Q.long()}, "q must be of floating point, got torch.int64"),
        ({"k": K.to("meta")}, "k must be on cpu, got meta"),
        ({"q": Q[:, :, :3]}, "q must have a multiple of 2 heads, as k has, got 3"),
        ({"q": Q[..., :0], "k": K[..., :0], "v": K[..., :0]}, "q must have D >= 1, got shape"),
        ({"scale": math.nan}, "scale must be finite and > 0, or None, got nan"),
        ({"scale": 0.0}, "scale must be finite and > 0, or None, got 0.0"),
        ({"q_positions": torch.ones(2, 3)}, "q_positions must be torch.int64, got torch.float32"),
        ({"q_positions": torch.ones(4).long()}, r"q_positions must be \[3\], got shape \(4,\)"),
        ({"q_positions": torch.ones(1, 3).long()}, r"q_positions must be \[2, 3\], got shape"),
        ({"q_positions": torch.tensor([0, -1, 4])}, "q_positions must be from 0 .* got -1"),
        ({"q_positions": torch.tensor([0, 2**31, 4])}, r"q_positions must be .* 2\^31, got 2147"),
        ({"q_lengths": FIVE.int()}, "q_lengths must be torch.int64, got torch.int32"),
        ({"k_lengths": FIVE[:1]}, r"k_lengths must be \[2\], got shape \(1,\)"),
        ({"k_lengths": FIVE.to("meta")}, "k_lengths must be on cpu, got meta"),
        ({"q_lengths": FIVE - 1}, "q_lengths must be from 0 to 3, got 4"),
        ({"k_lengths": FIVE + 1}, "k_lengths must be from 0 to 5, got 6"),
        ({"k_lengths": FIVE - 6}, "k_lengths must be from 0 to 5, got -1"),
    ],
)
def test_wrong_inputs(op: Backend, change: dict, line: str) -> None:
    if not op.is_reference and not op.name.startswith("cpu"):
        if "must be from 0" in line or "2147" in line:
            pytest.skip("a kernel cannot say which; tests/cudacheck looks")
        if op.name == "cuda" and "meta" in line:
            pytest.skip("the message names the device")
    call = {"q": Q, "k": K, "v": K, "mask": causal(), **change}
    with pytest.raises(InputError, match=f"^video_attention: {line}") as error:
        op(call.pop("q"), call.pop("k"), call.pop("v"), **call)
    assert "\n" not in str(error.value)
