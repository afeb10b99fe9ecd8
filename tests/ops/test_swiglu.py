"""swiglu: reference and CPU kernels against the formula in float64, values and gradients."""

import pytest
import torch
from backends import Backend, backends_of
from hypothesis import given, settings
from hypothesis import strategies as st
from row_cases import DTYPES, LAYOUTS, SHAPES, assert_close, laid_out, normal, with_gradients
from testkit import examples
from torch import Tensor

from rlir.errors import InputError
from rlir.ops import swiglu, swiglu_reference

backends = backends_of(swiglu, swiglu_reference)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def formula(gate: Tensor, up: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return (gate / (1 + (-gate).exp()) * up).to(dtype or gate.dtype)


def eager(gate: Tensor, up: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """torch in the same dtype."""
    return (torch.nn.functional.silu(gate) * up).to(dtype or gate.dtype)


def compare(op: Backend, gate: Tensor, up: Tensor, **options: torch.dtype) -> None:
    grad = normal(*gate.shape, dtype=options.get("dtype", gate.dtype), seed=3)
    with op.active():
        got = with_gradients(op.function, (gate, up), grad, **options)
    peer = with_gradients(eager, (gate, up), grad, **options)
    truth = with_gradients(formula, (gate.double(), up.double()), grad.double())
    for ours, theirs, exact in zip(got, peer, truth, strict=True):
        assert_close(ours, theirs, exact)


@backends
@dtypes
@pytest.mark.parametrize("shape", SHAPES)
def test_is_the_formula(op: Backend, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    compare(op, 4 * normal(*shape, dtype=dtype), normal(*shape, dtype=dtype, seed=1))


@backends
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(op: Backend, layout: str) -> None:
    compare(op, laid_out(normal(9, 4, 21), layout), normal(9, 4, 21, seed=1))


@backends
@dtypes
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_halves_are_two_tensors(op: Backend, dtype: torch.dtype, layout: str) -> None:
    both = laid_out(normal(3, 6, 38, dtype=dtype), layout)
    grad = normal(3, 6, 19, dtype=dtype, seed=1)
    with op.active():
        whole = with_gradients(op.function, (both,), grad)
        parts = with_gradients(op.function, both.chunk(2, -1), grad)
    assert whole[0].equal(parts[0])
    assert whole[1].equal(torch.cat(parts[1:], -1))


@backends
def test_the_result_may_have_another_dtype(op: Backend) -> None:
    gate, up = normal(5, 40), normal(5, 40, seed=1)
    compare(op, gate, up, dtype=torch.bfloat16)
    assert op(gate, up, dtype=torch.bfloat16).equal(op(gate, up).bfloat16()), "rounded once"
    assert op(gate.bfloat16(), up.bfloat16(), dtype=torch.float32).dtype == torch.float32


@backends
def test_far_from_zero(op: Backend) -> None:
    """Neither exp overflows nor 1 - sigma loses its digits."""
    gate = torch.tensor([[-1000.0, -90.0, -20.0, 0.0, 20.0, 90.0, 1000.0]])
    up, grad = torch.full_like(gate, 2.0), torch.ones_like(gate)
    with op.active():
        out, dgate, dup = with_gradients(op.function, (gate, up), grad)
    truth = with_gradients(formula, (gate.double(), up.double()), grad.double())
    torch.testing.assert_close(out.double()[0, 2:], truth[0][0, 2:], rtol=1e-6, atol=0)
    torch.testing.assert_close(dup.double()[0, 2:], truth[2][0, 2:], rtol=1e-6, atol=0)
    torch.testing.assert_close(dgate.double()[0, 2:5], truth[1][0, 2:5], rtol=1e-5, atol=0)
    assert out[0, :2].abs().max() < 1e-36
    assert dgate[0, 5:].equal(up[0, 5:])
    assert dgate[0, :2].abs().max() < 1e-34
    nan = op(torch.tensor([[torch.nan, 1.0]]), torch.ones(1, 2))
    assert nan.isnan().tolist() == [[True, False]]


@settings(max_examples=examples(40), deadline=None)
@given(rows=st.integers(0, 200), size=st.integers(1, 90), dtype=st.sampled_from(DTYPES))
def test_an_element_does_not_see_its_batch(rows: int, size: int, dtype: torch.dtype) -> None:
    gate, up, grad = (normal(rows + 3, size, dtype=dtype, seed=i) for i in range(3))
    whole = with_gradients(swiglu, (gate, up), grad)
    alone = with_gradients(swiglu, (gate[rows:], up[rows:]), grad[rows:])
    assert all(a[rows:].equal(b) for a, b in zip(whole, alone, strict=True))


def test_gradcheck() -> None:
    gate, up = (normal(3, 5, dtype=torch.float64, seed=i).requires_grad_() for i in range(2))
    assert torch.autograd.gradcheck(swiglu, (gate, up))
    assert torch.autograd.gradcheck(swiglu, (normal(3, 6, dtype=torch.float64).requires_grad_(),))


def test_opcheck() -> None:
    op, back = torch.ops.rlir.swiglu.default, torch.ops.rlir.swiglu_backward.default
    for rows in (0, 4):
        gate, up = normal(rows, 6).requires_grad_(), normal(rows, 6).requires_grad_()
        torch.library.opcheck(op, (gate, up), {"to_bfloat16": rows == 4})
        torch.library.opcheck(op, (gate, None), {"to_bfloat16": False})
        torch.library.opcheck(back, (normal(rows, 6), gate.detach(), up.detach()))
        torch.library.opcheck(back, (normal(rows, 3), gate.detach(), None))


def test_compiles_once_for_all_sizes() -> None:
    def double(gate: Tensor) -> Tensor:
        return swiglu(gate * 2)

    compiled = torch.compile(double, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows, stance in ((3, "default"), (8, "fail_on_recompile")):
        gate, grad = normal(rows, 2, 10), normal(rows, 2, 5, seed=1)
        with torch.compiler.set_stance(stance):
            got = with_gradients(compiled, (gate,), grad)
        want = with_gradients(double, (gate,), grad)
        assert all(a.equal(b) for a, b in zip(got, want, strict=True))


@backends
@pytest.mark.parametrize(
    ("gate", "up", "line"),
    [
        (torch.ones(()), None, r"gate must be \[..., M\] with M >= 1, got shape \(\)"),
        (torch.ones(2, 3), None, r"gate must hold two halves of one size where up is None, got"),
        (torch.ones(2, 3).long(), None, "gate must be of floating point, got torch.int64"),
        (torch.ones(2, 3), torch.ones(3, 3), r"up must be torch.float32 of shape \(2, 3\) on cpu"),
        (torch.ones(2, 3), torch.ones(2, 3).half(), "up must be torch.float32 of shape"),
    ],
)
def test_wrong_inputs(op: Backend, gate: Tensor, up: Tensor | None, line: str) -> None:
    with pytest.raises(InputError, match=f"^swiglu: {line}"):
        op(gate, up)
