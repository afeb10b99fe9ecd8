"""rotary: reference and CPU kernels against the formula, pair by pair; values and gradients."""

import pytest
import torch
from backends import Backend, backends_of
from hypothesis import given, settings
from hypothesis import strategies as st
from isas import assert_same_bits_everywhere
from rotary_cases import DTYPES, table
from row_cases import assert_close, normal
from testkit import examples
from torch import Tensor

from rlir import _library
from rlir.errors import InputError
from rlir.models.world_model import WorldModelConfig, rotary_table
from rlir.ops import rotary, rotary_reference

backends = backends_of(rotary, rotary_reference)
native = backends_of(rotary, rotary_reference, only=lambda op: not op.is_reference)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
layouts = pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])


def pairs(d: int, interleaved: bool) -> list[tuple[int, int]]:
    if interleaved:
        return [(i, i + 1) for i in range(0, d, 2)]
    return [(i, i + d // 2) for i in range(d // 2)]


def formula(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool) -> Tensor:
    """Pair by pair, in the dtype of x."""
    cos, sin = cos.to(x.dtype).unsqueeze(-2), sin.to(x.dtype).unsqueeze(-2)
    out = [None] * x.shape[-1]
    for i, j in pairs(x.shape[-1], interleaved):
        out[i] = x[..., i] * cos[..., i] - x[..., j] * sin[..., i]
        out[j] = x[..., j] * cos[..., j] + x[..., i] * sin[..., j]
    return torch.stack(out, -1)


def with_gradient(op, x: Tensor, grad: Tensor, *tables: Tensor, **options) -> list[Tensor]:
    leaf = x.detach().requires_grad_()
    out = op(leaf, *tables, **options)
    return [out.detach(), *torch.autograd.grad(out, leaf, grad.to(out.dtype))]


def compare(op: Backend, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> None:
    grad = normal(*x.shape, dtype=x.dtype, seed=3)
    with op.active():
        got = with_gradient(op.function, x, grad, cos, sin, interleaved=interleaved)
    peer = with_gradient(formula, x, grad, cos, sin, interleaved=interleaved)
    wide = (cos.double(), sin.double())
    truth = with_gradient(formula, x.double(), grad.double(), *wide, interleaved=interleaved)
    for ours, theirs, exact in zip(got, peer, truth, strict=True):
        assert_close(ours, theirs, exact)


@backends
@dtypes
@layouts
@pytest.mark.parametrize(
    "shape",
    [(2, 5, 3, 64), (1, 1, 1, 2), (3, 4, 2, 30), (0, 4, 2, 8), (2, 0, 2, 8), (1, 7, 16, 128)],
)
def test_is_the_formula(op: Backend, dtype: torch.dtype, interleaved: bool, shape: tuple) -> None:
    b, t, _, d = shape
    compare(op, normal(*shape, dtype=dtype), *table(t, d), interleaved)
    own = [normal(b, t, d, seed=i) for i in (1, 2)]
    compare(op, normal(*shape, dtype=dtype), *own, interleaved)


@backends
@dtypes
def test_is_a_rotation(op: Backend, dtype: torch.dtype) -> None:
    config = WorldModelConfig(codes=16, rows=2, columns=4, hidden=64, heads=2, kv_heads=1)
    cos, sin = rotary_table(config)
    x = normal(2, 9, 3, 32, dtype=dtype)
    out = op(x, cos[:9], sin[:9])
    turned = torch.view_as_complex(torch.stack(x.double().chunk(2, -1), -1))
    turned = turned * torch.complex(cos[:9, :16].double(), sin[:9, :16].double())[:, None]
    want = torch.cat([turned.real, turned.imag], -1)
    torch.testing.assert_close(out.double(), want, rtol=0, atol=6 * torch.finfo(dtype).eps)
    assert out[:, 0].equal(x[:, 0]), "position 0 turns nothing"


@native
@settings(max_examples=examples(40))
@given(
    b=st.integers(0, 3),
    t=st.integers(0, 5),
    h=st.integers(0, 3),
    half=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
    interleaved=st.booleans(),
    layout=st.sampled_from(["plain", "heads first", "fused", "step", "one token"]),
)
def test_the_kernel_has_the_bits_of_eager_pytorch(
    op: Backend,
    b: int,
    t: int,
    h: int,
    half: int,
    dtype: torch.dtype,
    interleaved: bool,
    layout: str,
) -> None:
    """In float32, rounded once; forward and backward, whatever the strides."""
    d = 2 * half
    x, grad = (normal(b, t, h, d, dtype=dtype, seed=i) for i in range(2))
    if layout == "heads first":
        x, grad = (y.transpose(1, 2).contiguous().transpose(1, 2) for y in (x, grad))
    elif layout == "fused":
        x = torch.cat([x.flatten(2), x.flatten(2)], 2)[..., h * d :].unflatten(2, (h, d))
    elif layout == "step":
        x = torch.stack([x, x], -1)[..., 1]
    elif layout == "one token":
        x, grad = x[:, :1].expand(b, t, h, d), grad[:, :, :1].expand(b, t, h, d)
    cos, sin = table(t, d)
    with op.active():
        got = with_gradient(rotary, x, grad, cos, sin, interleaved=interleaved)
    want = with_gradient(rotary_reference, x, grad, cos, sin, interleaved=interleaved)
    assert all(a.equal(c) for a, c in zip(got, want, strict=True))


@backends
def test_a_gradient_without_strides(op: Backend) -> None:
    x, (cos, sin) = normal(2, 3, 2, 8).requires_grad_(), table(3, 8)
    with op.active():
        op.function(x, cos, sin).sum().backward()
    want = with_gradient(rotary_reference, x, torch.ones(2, 3, 2, 8), cos, sin)[1]
    assert x.grad.equal(want)


@backends
def test_extreme_values_stay_in_their_pair(op: Backend) -> None:
    x, (cos, sin) = normal(1, 2, 2, 64), table(2, 64)
    want = op(x, cos, sin)
    x[0, 0, 1, 3], x[0, 1, 0, 40] = torch.nan, torch.inf
    got = op(x, cos, sin)
    for token, head, channel in ((0, 1, 3), (1, 0, 8)):
        for i in (channel, channel + 32):
            assert not got[0, token, head, i].isfinite()
            got[0, token, head, i] = want[0, token, head, i]
    assert got.equal(want)


def test_bits_do_not_depend_on_instruction_set_or_threads() -> None:
    """With rotary_append_."""
    assert_same_bits_everywhere("rotary_cases.py")


@layouts
def test_gradcheck(interleaved: bool) -> None:
    x = normal(2, 3, 2, 6, dtype=torch.float64).requires_grad_()
    cos, sin = (y.double() for y in table(3, 6))
    assert torch.autograd.gradcheck(lambda x: rotary(x, cos, sin, interleaved=interleaved), x)


def test_no_gradient_flows_to_the_tables() -> None:
    x, (cos, sin) = normal(1, 3, 2, 8), table(3, 8)
    for wide in (x, x.double()):
        assert not rotary(wide, cos.requires_grad_(), sin).requires_grad


@pytest.mark.skipif(_library.PATH is None, reason="the reference is forced")
@layouts
def test_the_second_derivative_of_the_kernel(interleaved: bool) -> None:
    x, grad, (cos, sin) = normal(1, 3, 2, 8), normal(1, 3, 2, 8, seed=1), table(3, 8)
    x.requires_grad_(), grad.requires_grad_()
    (dx,) = torch.autograd.grad(
        rotary(x, cos, sin, interleaved=interleaved), x, grad, create_graph=True
    )
    (again,) = torch.autograd.grad(dx, grad, x.detach())
    assert again.equal(rotary(x, cos, sin, interleaved=interleaved))


@pytest.mark.skipif(_library.PATH is None, reason="the reference is forced")
@layouts
def test_opcheck(interleaved: bool) -> None:
    op = torch.ops.rlir.rotary.default
    for b in (0, 2):
        x = normal(b, 3, 2, 8).requires_grad_()
        torch.library.opcheck(op, (x, *table(3, 8), interleaved, b == 2))
        own = (torch.ones(b, 3, 8), torch.ones(b, 3, 8))
        torch.library.opcheck(op, (x.detach().bfloat16(), *own, interleaved, False))


def test_compiles_once_for_all_sizes() -> None:
    def double(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return rotary(x * 2, cos, sin)

    compiled = torch.compile(double, backend="aot_eager", fullgraph=True, dynamic=True)
    for t, stance in ((3, "default"), (8, "fail_on_recompile")):
        x, grad = normal(2, t, 4, 10), normal(2, t, 4, 10, seed=1)
        with torch.compiler.set_stance(stance):
            got = with_gradient(compiled, x, grad, *table(t, 10))
        want = with_gradient(double, x, grad, *table(t, 10))
        assert all(a.equal(b) for a, b in zip(got, want, strict=True))


X, COS = torch.ones(2, 3, 4, 6), torch.ones(3, 6)


@backends
@pytest.mark.parametrize(
    ("x", "cos", "sin", "line"),
    [
        (X[0], COS, COS, r"x must be \[B, T, H, D\] with D even, got shape \(3, 4, 6\)"),
        (X[..., :5], COS, COS, r"x must be \[B, T, H, D\] with D even, got shape"),
        (X.long(), COS, COS, "x must be of floating point, got torch.int64"),
        (X, COS[:2], COS, r"cos must be \[3, 6\] or \[2, 3, 6\], got shape \(2, 6\)"),
        (X, COS, COS[:, :2], r"sin must be \[3, 6\], got shape \(3, 2\)"),
        (X, COS, COS.int(), "sin must be of floating point, got torch.int32"),
        (X, COS, COS.to("meta"), "sin must be on cpu, got meta"),
    ],
)
def test_wrong_inputs(op: Backend, x: Tensor, cos: Tensor, sin: Tensor, line: str) -> None:
    with pytest.raises(InputError, match=f"^rotary: {line}"):
        op(x, cos, sin)
