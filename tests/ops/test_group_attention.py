"""group_attention: reference and kernels against torch's attention on whole sequences; bits."""

from typing import Any

import pytest
import torch
from attention_cases import (
    DTYPES,
    FLOAT,
    MASKS,
    Group,
    assert_2x,
    group,
    jittered,
    masks,
    sdpa,
)
from backends import Backend, backends_of, instruction_sets
from hypothesis import given, settings
from hypothesis import strategies as st
from row_cases import normal
from testkit import FULL, examples
from torch import Tensor

from rlir import _library
from rlir.errors import InputError
from rlir.ops import (
    Mask,
    causal,
    diagonal,
    frame_causal,
    group_attention,
    group_attention_reference,
    video_attention,
    visible,
)

CPU = Backend(f"cpu-{instruction_sets()[-1]}", group_attention)
both = (group_attention, group_attention_reference)
backends = backends_of(*both)
native = backends_of(*both, only=lambda op: not op.is_reference)
quick = backends_of(*both, only=lambda op: op.is_reference or op == CPU)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
all_masks = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
needs_library = pytest.mark.skipif(_library.PATH is None, reason="the reference is forced")
NAMES = (
    *("out_prefix", "out_suffix", "dq_prefix", "dk_prefix", "dv_prefix"),
    *("dq_suffix", "dk_suffix", "dv_suffix"),
)


def plain(*tensors: Tensor, group_size: int, mask: Mask, scale: float | None = None) -> Any:
    """torch's attention on whole sequences, the prefix copied, in q's dtype."""
    g = Group(*tensors, group_size)
    p, total = g.q_prefix.shape[1], g.q_prefix.shape[1] + g.q_suffix.shape[1]
    seen = visible(mask, torch.arange(total), total)
    within = seen[:p, :p].expand(len(g.q_prefix), p, p)
    out_prefix, _ = sdpa(g.q_prefix, g.k_prefix, g.v_prefix, within, scale)
    _, k, v = g.whole()
    out_suffix, _ = sdpa(g.q_suffix, k, v, seen[p:].expand(len(k), -1, -1), scale)
    return out_prefix, out_suffix


def outputs(op: Any, g: Group, tensors: Any = None, **options: Any) -> list[Tensor]:
    """Both outputs and the gradients of all six."""
    leaves = [t.detach().requires_grad_() for t in (tensors or g.tensors)]
    grads = [normal(*t.shape, dtype=t.dtype, seed=9) for t in (g.q_prefix, g.q_suffix)]
    out = op(*leaves, group_size=g.size, **options)
    dtype = out[0].dtype
    given = [grad.to(dtype) for grad in grads]
    return [
        *(o.detach() for o in out),
        *torch.autograd.grad(out, leaves, given, materialize_grads=True),
    ]


def check_against_float64(op: Backend, *cases: Group, few: bool = False, **options: Any) -> None:
    few = few or op.is_reference  # eager PyTorch sums the group's gradients in any order
    with op.active():
        got = [outputs(op.function, g, **options) for g in cases]
    wide = [[t.double() for t in g.tensors] for g in cases]
    moved = [jittered(*g.tensors) for g in cases]
    assert_2x(
        got,
        [outputs(plain, g, **options) for g in cases],
        [outputs(plain, g, t, **options) for g, t in zip(cases, wide, strict=True)],
        [outputs(plain, g, t, **options) for g, t in zip(cases, moved, strict=True)],
        NAMES,
        few,
    )


# --- Values and gradients ------------------------------------------------------------------------


@backends
@dtypes
@all_masks
def test_matches_float64(op: Backend, dtype: torch.dtype, mask: Mask) -> None:
    check_against_float64(op, group(2, 3, 140, 37, dtype=dtype), mask=mask)


@backends
@dtypes
@pytest.mark.parametrize(
    ("heads", "d"), [((1, 1), 64), ((6, 2), 64), ((3, 3), 32), ((8, 1), 128), ((5, 1), 32)]
)
def test_heads_and_sizes(op: Backend, dtype: torch.dtype, heads: tuple, d: int) -> None:
    check_against_float64(op, group(1, 2, 60, 80, heads, d, dtype), mask=causal(), scale=0.3)


@backends
@pytest.mark.parametrize(
    ("b", "size", "p", "s"),
    [(0, 4, 9, 9), (2, 1, 30, 5), (2, 3, 0, 40), (2, 3, 40, 0), (1, 2, 0, 0)],
)
def test_edges(op: Backend, b: int, size: int, p: int, s: int) -> None:
    """No groups, groups of one, no prefix, no suffix, nothing at all."""
    check_against_float64(op, group(b, size, p, s), few=True, mask=causal())


@quick
@settings(max_examples=examples(25), derandomize=not FULL)
@given(data=st.data())
def test_anything(op: Backend, data: st.DataObject) -> None:
    b, size = data.draw(st.integers(0, 2)), data.draw(st.integers(1, 4))
    p, s = (data.draw(st.integers(0, n)) for n in (200, 60))
    hkv, ratio = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 5))
    dtype, d = data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from([32, 64, 128]))
    count = max(1, 100 // max(b * (p + size * s), 5))
    cases = [group(b, size, p, s, (hkv * ratio, hkv), d, dtype, seed=i) for i in range(count)]
    check_against_float64(op, *cases, few=True, mask=data.draw(masks()))


def test_gradcheck() -> None:
    for mask in (causal(2), frame_causal(3, 1), diagonal(2, 2, 1, 1)):
        g = group(1, 2, 4, 3, (2, 1), 3, torch.float64)
        leaves = [t.requires_grad_() for t in g.tensors]
        assert torch.autograd.gradcheck(
            lambda *t, mask=mask: group_attention(*t, group_size=2, mask=mask), leaves
        )


@backends
@dtypes
def test_each_output_alone_has_its_gradient(op: Backend, dtype: torch.dtype) -> None:
    g = group(2, 3, 40, 20, dtype=dtype)
    parts = []
    for index in range(2):
        leaves = [t.clone().requires_grad_() for t in g.tensors]
        with op.active():
            out = op.function(*leaves, group_size=3, mask=causal())[index]
            grad = normal(*out.shape, dtype=dtype, seed=9)
            parts.append(torch.autograd.grad(out, leaves, grad, materialize_grads=True))
    with op.active():
        whole = outputs(op.function, g, mask=causal())[2:]
    assert all(x.eq(0).all() for x in parts[0][3:]), "the prefix does not see its suffixes"
    assert parts[1][0].eq(0).all()
    tolerance = 1e-5 if dtype == FLOAT else 2e-2
    for name, total, a, b in zip(NAMES[2:], whole, *parts, strict=True):
        torch.testing.assert_close(
            total.float(), a.float() + b.float(), rtol=tolerance, atol=tolerance, msg=name
        )


@backends
def test_only_what_is_needed_gets_a_gradient(op: Backend) -> None:
    g = group(1, 2, 30, 20)
    with op.active():
        whole = outputs(op.function, g, mask=causal())[2:]
    for needed in range(6):
        leaves = [t.clone() for t in g.tensors]
        leaves[needed].requires_grad_()
        with op.active():
            out = op.function(*leaves, group_size=2, mask=causal())
            loss = sum((o * normal(*o.shape, seed=9)).sum() for o in out)
            loss.backward()
        torch.testing.assert_close(leaves[needed].grad, whole[needed], rtol=1e-6, atol=1e-6)
        assert all(leaf.grad is None for i, leaf in enumerate(leaves) if i != needed)


@backends
@dtypes
def test_gradients_without_strides(op: Backend, dtype: torch.dtype) -> None:
    g = group(1, 2, 30, 20, dtype=dtype)
    results = []
    for expand in (True, False):
        leaves = [t.clone().requires_grad_() for t in g.tensors]
        with op.active():
            out = op.function(*leaves, group_size=2, mask=causal())
            grads = [torch.ones((), dtype=dtype).expand(y.shape) for y in out]
            grads = grads if expand else [x.contiguous() for x in grads]
            results.append(torch.autograd.grad(out, leaves, grads))
    assert all(a.equal(b) for a, b in zip(*results, strict=True))


@backends
@dtypes
def test_undefined_values_stay_where_they_are_seen(op: Backend, dtype: torch.dtype) -> None:
    g = group(2, 3, 60, 20, dtype=dtype)
    with op.active():
        clean = op.function(*g.tensors, group_size=3, mask=causal())
        g.k_suffix[0, 19], g.v_suffix[0, 19] = torch.nan, torch.nan
        got = op.function(*g.tensors, group_size=3, mask=causal())
    assert got[0].equal(clean[0]), "prefixes"
    assert got[1][1:].equal(clean[1][1:]), "other suffixes"
    assert got[1][0, 19].isnan().all()


@native
@dtypes
@pytest.mark.parametrize("layout", ["heads first", "fused", "step", "one row"])
def test_strides_do_not_matter(op: Backend, dtype: torch.dtype, layout: str) -> None:
    g = group(2, 2, 40, 30, (2, 2), dtype=dtype)
    if layout == "heads first":
        new = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in g.tensors]
    elif layout == "fused":
        new = [torch.cat([t, t, t], 2)[:, :, 2:4] for t in g.tensors]
    elif layout == "step":
        new = [torch.stack([t, t * torch.nan], -1)[..., 0] for t in g.tensors]
    else:
        new = [t[:1].expand_as(t) for t in g.tensors]
    with op.active():
        got = outputs(op.function, g, new, mask=causal())
        want = outputs(op.function, g, [t.contiguous() for t in new], mask=causal())
    for name, a, b in zip(NAMES, got, want, strict=True):
        assert a.equal(b), name


def test_other_dtypes_and_head_sizes_run_the_reference() -> None:
    for options in ({"dtype": torch.float64}, {"dtype": torch.float16}, {"d": 260}):
        g = group(1, 2, 9, 4, **options)
        got = group_attention(*g.tensors, group_size=2, mask=causal())
        want = group_attention_reference(*g.tensors, group_size=2, mask=causal())
        assert all(a.equal(b) for a, b in zip(got, want, strict=True))


# --- The same bits -------------------------------------------------------------------------------


@native
@dtypes
@all_masks
@pytest.mark.parametrize("p", [0, 77, 128, 150])
def test_has_the_bits_of_whole_sequences(
    op: Backend, dtype: torch.dtype, mask: Mask, p: int
) -> None:
    if mask.kind == "frame_causal":
        image, action, _ = mask.numbers
        p = p and image + 3 * (image + action)  # ends with a frame
    g = group(2, 3, p, 60, dtype=dtype)
    with op.active():
        out_prefix, out_suffix = op.function(*g.tensors, group_size=3, mask=mask)
        whole = video_attention(*g.whole(), mask=mask)
    assert out_suffix.equal(whole[:, p:])
    assert out_prefix.equal(whole[::3, :p])


@native
@dtypes
def test_bits_do_not_depend_on_the_group(op: Backend, dtype: torch.dtype) -> None:
    g = group(2, 3, 133, 40, dtype=dtype)
    with op.active():
        whole = op.function(*g.tensors, group_size=3, mask=causal())
        alone = op.function(
            *(t[1:2] for t in g.tensors[:3]),
            *(t[4:5] for t in g.tensors[3:]),
            group_size=1,
            mask=causal(),
        )
    assert alone[0].equal(whole[0][1:2])
    assert alone[1].equal(whole[1][4:5])


# --- The operator --------------------------------------------------------------------------------


@needs_library
@dtypes
def test_opcheck(dtype: torch.dtype) -> None:
    forward = torch.ops.rlir.group_attention.default
    backward = torch.ops.rlir.group_attention_backward.default
    mask = diagonal(2, 3, 1, 1)
    rest = (3, mask.kind, mask.numbers, 0.3)
    for b in (0, 2):
        g = group(b, 3, 9, 7, dtype=dtype)
        torch.library.opcheck(forward, (*(t.clone().requires_grad_() for t in g.tensors), *rest))
        saved = (*g.tensors, *forward(*g.tensors, *rest))
        grads = (torch.ones_like(g.q_prefix), torch.ones_like(g.q_suffix))
        for d_prefix, d_suffix in (grads, (None, grads[1]), (grads[0], None)):
            torch.library.opcheck(backward, (d_prefix, d_suffix, *saved, *rest))


def test_compiles_once_for_all_sizes() -> None:
    def double(q_prefix: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        return group_attention(q_prefix * 2, *rest, group_size=3, mask=frame_causal(6, 2))

    compiled = torch.compile(double, backend="aot_eager", fullgraph=True, dynamic=True)
    for b, stance in ((2, "default"), (4, "fail_on_recompile")):
        g = group(b, 3, 11 * b, 7 * b, (10, 5))
        results = []
        for function in (compiled, double):
            leaves = [t.clone().requires_grad_() for t in g.tensors]
            with torch.compiler.set_stance(stance if function is compiled else "default"):
                out = function(*leaves)
                grads = [normal(*o.shape, seed=9) for o in out]
                results.append([*out, *torch.autograd.grad(out, leaves, grads)])
        assert all(a.equal(b) for a, b in zip(*results, strict=True))


X = group(2, 3, 9, 7)


@backends
@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"mask": 3}, r"mask must be causal\(\), frame_causal\(\) or .* got a int"),
        ({"q_prefix": X.q_prefix[0]}, r"q_prefix must be \[B, T, Hq, D\], got shape"),
        ({"q_suffix": X.q_suffix[0]}, r"q_suffix must be \[B, T, Hq, D\], got shape"),
        ({"k_suffix": X.k_suffix[0]}, r"k_suffix must be \[B, T, Hkv, D\], got shape"),
        ({"group_size": 0}, "group_size must be an integer >= 1, got 0"),
        ({"group_size": 4}, "q_suffix must have a multiple of group_size 4 rows, got 6"),
        ({"group_size": 2}, r"q_prefix must be \[3, 9, 4, 32\], got shape \(2, 9, 4, 32\)"),
        ({"q_prefix": X.q_prefix[:, :, :2]}, r"q_prefix must be \[2, 9, 4, 32\], got shape"),
        ({"k_prefix": X.k_prefix[:, :8]}, r"k_prefix must be \[2, 9, 2, 32\], got shape"),
        ({"v_prefix": X.v_prefix[:, :, :1]}, r"v_prefix must be \[2, 9, 2, 32\], got shape"),
        ({"k_suffix": X.k_suffix[:, :6]}, r"k_suffix must be \[6, 7, 2, 32\], got shape"),
        ({"v_suffix": X.v_suffix[..., :8]}, r"v_suffix must be \[6, 7, 2, 32\], got shape"),
        ({"v_suffix": X.v_suffix.bfloat16()}, "v_suffix must be torch.float32 as q_prefix is"),
        ({"q_suffix": X.q_suffix.bfloat16()}, "k_prefix must be torch.bfloat16 as q_suffix is"),
        ({"q_suffix": X.q_suffix[:, :, :3]}, "q_suffix must have a multiple of 2 heads, as"),
        ({"scale": float("nan")}, "scale must be finite and > 0, or None, got nan"),
    ],
)
def test_wrong_inputs(op: Backend, change: dict, line: str) -> None:
    names = ("q_prefix", "k_prefix", "v_prefix", "q_suffix", "k_suffix", "v_suffix")
    tensors = {name: change.get(name, getattr(X, name)) for name in names}
    options = {"group_size": 3, "mask": causal(), **change}
    options = {k: v for k, v in options.items() if k not in names}
    with pytest.raises(InputError, match=f"^group_attention: {line}") as error:
        op(*tensors.values(), **options)
    assert "\n" not in str(error.value)
