"""linear: reference and CPU kernels against the formula in float64, values, gradients and bits."""

import math

import pytest
import torch
import torch.nn.functional as F
from backends import (
    Backend,
    backends_of,
    instruction_set,
    instruction_sets,
    instruction_sets_and_amx,
    needs_amx,
    threads,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st
from isas import assert_same_bits_everywhere
from linear_cases import SIZES, operands
from row_cases import DTYPES, LAYOUTS, assert_close, laid_out, normal, with_gradients
from testkit import examples
from torch import Tensor

from rlir.errors import InputError
from rlir.ops import head_logits, linear, linear_reference

backends = backends_of(linear, linear_reference)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def peers(inputs: list[Tensor], grad: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """torch's results, as of a large matrix: rows, inputs and outputs up to 32 are filled with
    zeros. Of a single row or column torch has a dot product with many sums, more exact than its
    product of matrices, whose order is the one that a batch cannot change. (And contiguous: on AMX
    its product of padded rows of bfloat16 takes the padding in.)
    """
    x, weight, *bias = inputs
    (*lead, k), o = x.shape, len(weight)
    n = math.prod(lead)
    rows, grad = x.reshape(n, k), grad.reshape(n, o)

    def filled(m: Tensor) -> Tensor:
        return F.pad(m, [0, max(0, 32 - m.shape[1]), 0, max(0, 32 - m.shape[0])])

    wide = [filled(rows), filled(weight), *(F.pad(b, [0, max(0, 32 - o)]) for b in bias)]
    out, dx, dw, *db = with_gradients(F.linear, wide, filled(grad))
    found = [out[:n, :o].reshape(*lead, o), dx[:n, :k].reshape(x.shape), dw[:o, :k]]
    return [found[0].to(dtype), *found[1:], *(b[:o] for b in db)]


def results(
    op: Backend, inputs: tuple[Tensor, ...], grad: Tensor, **options: torch.dtype
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """The op's, PyTorch's in x's dtype, and float64's of the operands that both see."""
    dtype = inputs[0].dtype
    grad = grad.to(options.get("dtype", dtype))
    with op.active():
        got = with_gradients(op.function, inputs, grad, **options)
    seen = [x.to(dtype).contiguous() for x in inputs]
    peer = peers(seen, grad.to(dtype), got[0].dtype)
    peer = [peer[0], *(g.to(x.dtype) for g, x in zip(peer[1:], inputs, strict=True))]
    exact = [seen[0].double(), seen[1].double(), *(x.double() for x in inputs[2:])]
    truth = with_gradients(F.linear, exact, grad.to(dtype).double())
    return list(zip(got, peer, truth, strict=True))


def compare(op: Backend, inputs: tuple[Tensor, ...], grad: Tensor, **options: torch.dtype) -> None:
    for found in results(op, inputs, grad, **options):
        assert_close(*found)


@backends
@dtypes
@pytest.mark.parametrize("sizes", [*SIZES, (0, 5, 4), (3, 5, 0), (3, 0, 5), (2, 1, 1)])
def test_is_the_formula(op: Backend, dtype: torch.dtype, sizes: tuple[int, int, int]) -> None:
    x, weight, bias, grad = operands(*sizes, dtype=dtype)
    compare(op, (x, weight), grad)
    compare(op, (x, weight, bias), grad)


@backends
@pytest.mark.parametrize("layout", LAYOUTS)
@dtypes
def test_any_layout(op: Backend, layout: str, dtype: torch.dtype) -> None:
    x, weight = normal(5, 4, 21, dtype=dtype), normal(13, 21, dtype=dtype, seed=1)
    grad = normal(5, 4, 13, dtype=dtype, seed=2)
    inputs = (laid_out(x, layout), laid_out(weight, layout), laid_out(normal(13, seed=3), layout))
    compare(op, inputs, laid_out(grad, layout))
    plain = with_gradients(op, (x, weight, inputs[2].contiguous()), grad)
    for a, b in zip(with_gradients(op, inputs, laid_out(grad, layout)), plain, strict=True):
        torch.testing.assert_close(a, b)


@backends
def test_operands_are_rounded_to_the_dtype_of_x(op: Backend) -> None:
    x, weight, bias, grad = operands(40, 70, 30)
    low = x.bfloat16()
    compare(op, (low, weight, bias), grad, dtype=torch.float32)
    assert op(low, weight, bias).equal(op(low, weight.bfloat16(), bias))
    assert op(x, weight.bfloat16()).equal(op(x, weight.bfloat16().float()))
    got = with_gradients(op, (low, weight), grad, dtype=torch.float32)
    assert [g.dtype for g in got] == [torch.float32, torch.bfloat16, torch.float32]
    if op.is_reference:
        return  # leaves gradients as they come
    rounded = with_gradients(op, (low, weight), grad.bfloat16().float(), dtype=torch.float32)
    assert all(a.equal(b) for a, b in zip(got, rounded, strict=True))


@backends
def test_the_result_may_have_another_dtype(op: Backend) -> None:
    x, weight, bias, grad = operands(9, 40, 20)
    compare(op, (x, weight, bias), grad, dtype=torch.bfloat16)
    assert op(x, weight, dtype=torch.bfloat16).equal(op(x, weight).bfloat16())
    low = x.bfloat16()
    wide = op(low, weight, bias, dtype=torch.float32)
    assert wide.bfloat16().equal(op(low, weight, bias)), "rounded once"


@backends
def test_hostile_values(op: Backend) -> None:
    x, weight, bias, _ = operands(5, 33, 20)
    x[1, 4], x[2, 0], x[3] = torch.nan, torch.inf, 0
    weight[7, 3] = torch.nan
    for dtype in DTYPES:
        out = op(x.to(dtype), weight, bias)
        assert out[1].isnan().all()
        assert out[:, 7].isnan().all()
        assert not out[2].isfinite().any()
        kept = [i for i in range(20) if i != 7]
        assert out[3, kept].equal(bias[kept].to(dtype))
        clean = op(x[[0, 4]].to(dtype), weight[kept], bias[kept])
        torch.testing.assert_close(out[[0, 4]][:, kept], clean)


@settings(max_examples=examples(40), deadline=None)
@given(
    rows=st.integers(0, 300),
    inputs=st.integers(0, 300),
    outputs=st.integers(1, 120),
    dtype=st.sampled_from(DTYPES),
    weights=st.sampled_from(DTYPES),
    isa=st.sampled_from(instruction_sets()),
)
def test_a_row_does_not_see_its_batch(
    rows: int, inputs: int, outputs: int, dtype: torch.dtype, weights: torch.dtype, isa: str
) -> None:
    x, weight, bias, grad = operands(rows + 3, inputs, outputs, dtype=dtype)
    weight = weight.to(weights)
    with instruction_set(isa):
        whole = with_gradients(linear, (x, weight, bias), grad)
        alone = with_gradients(linear, (x[rows:], weight, bias), grad[rows:])
        one = linear(x[rows], weight, bias)
    assert whole[0][rows:].equal(alone[0])
    assert whole[1][rows:].equal(alone[1])
    assert whole[0][rows].equal(one)


@settings(max_examples=examples(30), deadline=None)
@example(n=128, k=1, o=49, dtype=torch.float32, layouts=("plain",) * 3, isa=instruction_sets()[0])
@example(n=1, k=1, o=22, dtype=torch.float32, layouts=("plain",) * 3, isa=instruction_sets()[0])
@given(
    n=st.integers(0, 150),
    k=st.integers(0, 150),
    o=st.integers(0, 70),
    dtype=st.sampled_from(DTYPES),
    layouts=st.tuples(*[st.sampled_from(LAYOUTS)] * 3),
    isa=st.sampled_from(instruction_sets()),
)
def test_any_shape(
    n: int, k: int, o: int, dtype: torch.dtype, layouts: tuple[str, ...], isa: str
) -> None:
    """The largest errors of two sums of a few numbers are luck, of the same spread or not: small
    shapes are drawn until each result has had 64 values, and those are compared together.
    """
    op, smallest = Backend(f"cpu-{isa}", linear), min(n * k, k * o, n * o, o) or 64
    draws = []
    for draw in range(-(-64 // smallest)):
        x, weight, bias, grad = operands(n, k, o, dtype=dtype, seed=4 * draw)
        x, weight, grad = map(laid_out, (x, weight, grad), layouts)
        draws.append(results(op, (x, weight, bias), grad))
    for found in zip(*draws, strict=True):
        assert_close(*(torch.cat([x.flatten() for x in kind]) for kind in zip(*found, strict=True)))


@pytest.mark.parametrize("isa", instruction_sets_and_amx())
@dtypes
@pytest.mark.parametrize("rows", [3, 70])
def test_has_the_bits_of_the_rollout_engine(rows: int, dtype: torch.dtype, isa: str) -> None:
    """Whose products are those of head_logits: the same header, packed by other code."""
    h, weight = normal(rows, 301, dtype=dtype), normal(70, 301, seed=1)
    with instruction_set(isa):
        got = linear(h, weight, dtype=torch.float32)
        assert got.equal(head_logits(h, weight.to(dtype)))


def test_bits_do_not_depend_on_instruction_set_or_threads() -> None:
    assert_same_bits_everywhere("linear_cases.py", "torch.bfloat16 linear")


@needs_amx
@dtypes
def test_bits_on_amx_do_not_depend_on_threads(dtype: torch.dtype) -> None:
    found = []
    for isa in (instruction_sets()[0], "amx", "amx"):
        with instruction_set(isa), threads(len(found) + 1):
            out = with_gradients(linear, operands(300, 70, 90, dtype)[:3], normal(300, 90))
            few = linear(*operands(7, 400, 90, dtype)[:3])
        found.append([*out, few])
    (others, one, three) = found
    assert all(a.equal(b) for a, b in zip(one, three, strict=True))
    same = all(a.equal(b) for a, b in zip(one, others, strict=True))
    assert same == (dtype == torch.float32), "tiles for pairs of bfloat16 alone"


def test_gradcheck() -> None:
    inputs = (normal(s, t, dtype=torch.float64) for s, t in ((3, 5), (4, 5)))
    leaves = [x.requires_grad_() for x in (*inputs, normal(4, dtype=torch.float64))]
    assert torch.autograd.gradcheck(linear, leaves)


@dtypes
def test_any_gradient_alone(dtype: torch.dtype) -> None:
    x, weight, bias, grad = operands(70, 9, 20, dtype=dtype)
    every = with_gradients(linear, (x, weight, bias), grad)
    for i, leaf in enumerate((x, weight, bias)):
        inputs = [x, weight, bias]
        inputs[i] = leaf.clone().requires_grad_()
        (alone,) = torch.autograd.grad(linear(*inputs), inputs[i], grad)
        assert alone.equal(every[1 + i])


@backends
@dtypes
def test_a_gradient_of_stride_0(op: Backend, dtype: torch.dtype) -> None:
    x, weight, bias, _ = operands(21, 34, 10, dtype=dtype)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    with op.active():
        got = torch.autograd.grad(op.function(*leaves).sum(), leaves)
        want = torch.autograd.grad(op.function(*leaves), leaves, torch.ones(21, 10, dtype=dtype))
    assert all(a.equal(b) for a, b in zip(got, want, strict=True))
    row = torch.ones(10, dtype=dtype).expand(21, 10)
    assert torch.autograd.grad(linear(*leaves), leaves, row)[1].equal(want[1]) or op.is_reference


def test_opcheck() -> None:
    op, back = torch.ops.rlir.linear.default, torch.ops.rlir.linear_backward.default
    for rows in (0, 4):
        x, weight, bias, grad = operands(rows, 6, 5)
        leaves = [t.requires_grad_() for t in (x, weight, bias)]
        torch.library.opcheck(op, leaves, {"to_bfloat16": rows == 4})
        torch.library.opcheck(op, leaves[:2], {"to_bfloat16": False})
        needs = {"need_x": True, "need_weight": rows == 4, "need_bias": rows == 0}
        torch.library.opcheck(back, (grad, x.detach(), weight.detach()), needs)


@pytest.mark.parametrize("biased", [False, True])
def test_compiles_once_for_all_sizes(biased: bool) -> None:
    def double(x: Tensor, weight: Tensor, *bias: Tensor) -> Tensor:
        return linear(x * 2, weight, *bias)

    compiled = torch.compile(double, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows, stance in ((3, "default"), (8, "fail_on_recompile")):
        x, weight, grad = normal(rows, 2, 10), normal(6, 10), normal(rows, 2, 6, seed=1)
        inputs = (x, weight, normal(6, seed=2)) if biased else (x, weight)
        with torch.compiler.set_stance(stance):
            got = with_gradients(compiled, inputs, grad)
        want = with_gradients(double, inputs, grad)
        assert all(a.equal(b) for a, b in zip(got, want, strict=True))


@backends
@pytest.mark.parametrize(
    ("inputs", "options", "line"),
    [
        ((torch.ones(()), torch.ones(1, 1)), {}, r"x must be \[..., K\], got shape \(\)"),
        ((torch.ones(2, 3), torch.ones(4, 2)), {}, r"weight must be \[N, 3\], got shape \(4, 2\)"),
        ((torch.ones(2, 3), torch.ones(3)), {}, r"weight must be \[N, 3\], got shape \(3,\)"),
        ((torch.ones(2, 3), torch.ones(4, 3), torch.ones(3)), {}, r"bias must be \[4\], got shape"),
        ((torch.ones(2, 3).long(), torch.ones(4, 3)), {}, "x must be of floating point, got"),
        ((torch.ones(2, 3), torch.ones(4, 3), torch.ones(4).int()), {}, "bias must be of floating"),
        ((torch.ones(2, 3), torch.ones(4, 3)), {"dtype": torch.int8}, "dtype must be of floating"),
        ((torch.ones(2, 3), torch.ones(4, 3, device="meta")), {}, "weight must be on cpu, got"),
    ],
)
def test_wrong_inputs(op: Backend, inputs: tuple[Tensor, ...], options: dict, line: str) -> None:
    with pytest.raises(InputError, match=f"^linear: {line}"):
        op(*inputs, **options)
