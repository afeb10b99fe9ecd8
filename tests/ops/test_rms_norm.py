"""rms_norm: reference and CPU kernels against the formula in float64, values and gradients."""

import pytest
import torch
from backends import Backend, backends_of
from hypothesis import given, settings
from hypothesis import strategies as st
from isas import assert_same_bits_everywhere
from row_cases import DTYPES, LAYOUTS, SHAPES, assert_close, laid_out, normal, with_gradients
from testkit import examples
from torch import Tensor

from rlir.errors import InputError
from rlir.ops import rms_norm, rms_norm_reference

backends = backends_of(rms_norm, rms_norm_reference)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def formula(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def eager(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """torch in the same dtype."""
    return torch.nn.functional.rms_norm(x, weight.shape, weight.to(x.dtype), eps)


def compare(op: Backend, x: Tensor, weight: Tensor, **options: torch.dtype) -> None:
    grad = normal(*x.shape, dtype=options.get("dtype", x.dtype), seed=3)
    with op.active():
        got = with_gradients(op.function, (x, weight), grad, **options)
    peer = with_gradients(eager, (x, weight), grad)
    peer[0] = peer[0].to(got[0].dtype)
    truth = with_gradients(formula, (x.double(), weight.double()), grad.double())
    for ours, theirs, exact in zip(got, peer, truth, strict=True):
        assert_close(ours, theirs, exact)


@backends
@dtypes
@pytest.mark.parametrize("shape", SHAPES)
def test_is_the_formula(op: Backend, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    compare(op, normal(*shape, dtype=dtype), normal(shape[-1], seed=1))


@backends
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(op: Backend, layout: str) -> None:
    compare(op, laid_out(normal(9, 4, 21), layout), laid_out(normal(21, seed=1), "step"))


@backends
def test_the_result_may_have_another_dtype(op: Backend) -> None:
    x, weight = normal(5, 40), normal(40, seed=1)
    compare(op, x, weight, dtype=torch.bfloat16)
    rounded = op(x, weight, dtype=torch.bfloat16)
    assert rounded.equal(op(x, weight).bfloat16()), "rounded once"
    assert op(x.bfloat16(), weight, dtype=torch.float32).dtype == torch.float32
    assert op(x, weight.bfloat16()).equal(op(x, weight.bfloat16().float()))


@backends
def test_extreme_rows(op: Backend) -> None:
    x = normal(5, 33)
    x[0], x[1], x[2, 7], x[3, 2] = 0, 1e18, torch.nan, torch.inf
    out = op(x, torch.ones(33), 1e-6)
    assert out[0].eq(0).all()
    torch.testing.assert_close(out[1], torch.ones(33))
    assert out[2].isnan().all()
    assert out[4].equal(op(x[4], torch.ones(33), 1e-6)), "other rows do not see it"
    one = op(torch.zeros(2, 3), torch.ones(3), 0.0)
    assert one.isnan().all(), "0 / 0"


@settings(max_examples=examples(40), deadline=None)
@given(rows=st.integers(0, 200), size=st.integers(1, 90), dtype=st.sampled_from(DTYPES))
def test_a_row_does_not_see_its_batch(rows: int, size: int, dtype: torch.dtype) -> None:
    x, weight, grad = normal(rows + 3, size, dtype=dtype), normal(size), normal(rows + 3, size)
    whole = with_gradients(rms_norm, (x, weight), grad)
    alone = with_gradients(rms_norm, (x[rows:], weight), grad[rows:])
    assert whole[0][rows:].equal(alone[0])
    assert whole[1][rows:].equal(alone[1])


def test_bits_do_not_depend_on_instruction_set_or_threads() -> None:
    assert_same_bits_everywhere("row_cases.py")


def test_gradcheck() -> None:
    x, weight = normal(3, 5, dtype=torch.float64), normal(5, dtype=torch.float64)
    assert torch.autograd.gradcheck(rms_norm, (x.requires_grad_(), weight.requires_grad_()))


def test_either_gradient_alone() -> None:
    x, weight = normal(70, 9), normal(9, seed=1)
    both = with_gradients(rms_norm, (x, weight), normal(70, 9, seed=2))
    for i, leaf in enumerate((x, weight)):
        inputs = [x, weight]
        inputs[i] = leaf.clone().requires_grad_()
        (alone,) = torch.autograd.grad(rms_norm(*inputs), inputs[i], normal(70, 9, seed=2))
        assert alone.equal(both[1 + i])


def test_opcheck() -> None:
    op, back = torch.ops.rlir.rms_norm.default, torch.ops.rlir.rms_norm_backward.default
    for rows in (0, 4):
        x, weight = normal(rows, 6).requires_grad_(), normal(6).requires_grad_()
        torch.library.opcheck(op, (x, weight), {"eps": 1e-5, "to_bfloat16": rows == 4})
        inputs = (normal(rows, 6), x.detach(), weight.detach(), torch.ones(rows))
        torch.library.opcheck(back, inputs, {"need_x": True, "need_weight": rows == 4})


def test_compiles_once_for_all_sizes() -> None:
    def double(x: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(x * 2, weight)

    compiled = torch.compile(double, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows, stance in ((3, "default"), (8, "fail_on_recompile")):
        x, weight, grad = normal(rows, 2, 10), normal(10), normal(rows, 2, 10, seed=1)
        with torch.compiler.set_stance(stance):
            got = with_gradients(compiled, (x, weight), grad)
        want = with_gradients(double, (x, weight), grad)
        assert all(a.equal(b) for a, b in zip(got, want, strict=True))


@backends
@pytest.mark.parametrize(
    ("x", "weight", "options", "line"),
    [
        (torch.ones(()), torch.ones(1), {}, r"x must be \[..., D\] with D >= 1, got shape \(\)"),
        (torch.ones(2, 0), torch.ones(0), {}, r"x must be \[..., D\] with D >= 1"),
        (torch.ones(2, 3), torch.ones(2), {}, r"weight must be \[3\], got shape \(2,\)"),
        (torch.ones(2, 3).long(), torch.ones(3), {}, "x must be of floating point, got"),
        (torch.ones(2, 3), torch.ones(3), {"eps": -1.0}, "eps must be finite and >= 0, got -1"),
        (torch.ones(2, 3), torch.ones(3), {"dtype": torch.int8}, "dtype must be of floating"),
    ],
)
def test_wrong_inputs(op: Backend, x: Tensor, weight: Tensor, options: dict, line: str) -> None:
    with pytest.raises(InputError, match=f"^rms_norm: {line}"):
        op(x, weight, **options)
