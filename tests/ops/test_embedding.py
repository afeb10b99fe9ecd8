"""embedding: reference and CPU kernels against indexing in float64, values, gradients and bits."""

import pytest
import torch
import torch.nn.functional as F
from backends import Backend, backends_of, instruction_set, instruction_sets
from hypothesis import given, settings
from hypothesis import strategies as st
from row_cases import DTYPES, LAYOUTS, assert_close, laid_out, normal, with_gradients
from testkit import examples
from torch import Tensor

from rlir.errors import InputError
from rlir.ops import embedding, embedding_reference

backends = backends_of(embedding, embedding_reference)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def some_ids(*shape: int, below: int) -> Tensor:
    return torch.randint(below, shape, generator=torch.Generator().manual_seed(sum(shape)))


def compare(op: Backend, ids: Tensor, weight: Tensor, grad: Tensor, **options: torch.dtype) -> None:
    grad = grad.to(options.get("dtype", weight.dtype))
    with op.active():
        got = with_gradients(lambda w: op.function(ids, w, **options), (weight,), grad)
    peer = with_gradients(lambda w: F.embedding(ids.long(), w), (weight,), grad.to(weight.dtype))
    peer[0] = peer[0].to(got[0].dtype)
    truth = with_gradients(lambda w: w[ids.long()], (weight.double(),), grad.double())
    for ours, theirs, exact in zip(got, peer, truth, strict=True):
        assert_close(ours, theirs, exact)


@backends
@dtypes
@pytest.mark.parametrize("shape", [(4, 50), (0,), (), (700,), (2, 0, 3)])
@pytest.mark.parametrize("table", [(9, 37), (1, 1), (300, 64), (5, 0)])
def test_is_indexing(
    op: Backend, dtype: torch.dtype, shape: tuple[int, ...], table: tuple[int, int]
) -> None:
    ids, weight = some_ids(*shape, below=table[0]), normal(*table, dtype=dtype)
    assert op(ids, weight).equal(weight[ids])
    assert op(ids.int(), weight).equal(weight[ids])
    compare(op, ids, weight, normal(*shape, table[1], dtype=dtype, seed=1))


@backends
@dtypes
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(op: Backend, layout: str, dtype: torch.dtype) -> None:
    ids, weight = some_ids(6, 30, below=11), normal(11, 21, dtype=dtype)
    grad = normal(6, 30, 21, dtype=dtype, seed=1)
    compare(op, torch.stack([ids, ids + 99], -1)[..., 0], laid_out(weight, layout), grad)
    compare(op, ids.t(), weight, laid_out(grad.transpose(0, 1), layout))


@backends
def test_the_result_may_have_another_dtype(op: Backend) -> None:
    ids, weight, grad = some_ids(40, below=7), normal(7, 19), normal(40, 19, seed=1)
    compare(op, ids, weight, grad, dtype=torch.bfloat16)
    assert op(ids, weight, dtype=torch.bfloat16).equal(weight.bfloat16()[ids])
    wide = op(ids, weight.bfloat16(), dtype=torch.float32)
    assert wide.equal(weight.bfloat16().float()[ids])


@settings(max_examples=examples(40), deadline=None)
@given(
    ids=st.lists(st.integers(0, 12), max_size=200),
    size=st.integers(1, 50),
    dtype=st.sampled_from(DTYPES),
    isa=st.sampled_from(instruction_sets()),
)
def test_gradients_add_up_in_the_order_of_rows(
    ids: list[int], size: int, dtype: torch.dtype, isa: str
) -> None:
    weight, grad = normal(13, size, dtype=dtype), normal(len(ids), size, dtype=dtype, seed=1)
    where = torch.tensor(ids, dtype=torch.int64)
    with instruction_set(isa):
        _, got = with_gradients(lambda w: embedding(where, w), (weight,), grad)
    want = torch.zeros(13, size)
    for id_, row in zip(ids, grad.float(), strict=True):
        want[id_] += row
    assert got.equal(want.to(dtype))


@backends
def test_nan_stays_in_its_row(op: Backend) -> None:
    weight, grad = normal(4, 18), torch.ones(5, 18)
    weight[2], grad[1] = torch.nan, torch.inf
    ids = torch.tensor([0, 1, 2, 3, 0])
    with op.active():
        out, dw = with_gradients(lambda w: op.function(ids, w), (weight,), grad)
    assert out.isnan().any(-1).tolist() == [False, False, True, False, False]
    assert dw.isinf().any(-1).tolist() == [False, True, False, False]


@backends
@dtypes
def test_a_gradient_of_stride_0(op: Backend, dtype: torch.dtype) -> None:
    ids, weight = some_ids(33, below=5), normal(5, 20, dtype=dtype).requires_grad_()
    with op.active():
        (got,) = torch.autograd.grad(op.function(ids, weight).sum(), weight)
    assert got.equal(torch.bincount(ids, minlength=5)[:, None].to(dtype).expand(5, 20))


def test_gradcheck() -> None:
    weight = normal(4, 3, dtype=torch.float64).requires_grad_()
    ids = torch.tensor([[1, 1, 3], [0, 1, 3]])
    assert torch.autograd.gradcheck(lambda w: embedding(ids, w), (weight,))


def test_opcheck() -> None:
    op, back = torch.ops.rlir.embedding.default, torch.ops.rlir.embedding_backward.default
    for rows in (0, 4):
        ids, weight = some_ids(rows, below=3), normal(3, 6).requires_grad_()
        torch.library.opcheck(op, (ids, weight), {"to_bfloat16": rows == 4})
        torch.library.opcheck(back, (normal(rows, 6), ids, weight.detach()))


def test_compiles_once_for_all_sizes() -> None:
    def double(ids: Tensor, weight: Tensor) -> Tensor:
        return embedding(ids, weight * 2)

    compiled = torch.compile(double, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows, stance in ((3, "default"), (8, "fail_on_recompile")):
        ids, weight, grad = some_ids(rows, 2, below=5), normal(5, 10), normal(rows, 2, 10, seed=1)
        with torch.compiler.set_stance(stance):
            got = with_gradients(lambda w, i=ids: compiled(i, w), (weight,), grad)
        want = with_gradients(lambda w, i=ids: double(i, w), (weight,), grad)
        assert all(a.equal(b) for a, b in zip(got, want, strict=True))


@backends
@pytest.mark.parametrize(
    ("ids", "weight", "options", "line"),
    [
        (torch.tensor([0, 3]), torch.ones(3, 2), {}, "ids must be from 0 and below 3, got 3"),
        (torch.tensor([-1, 0]), torch.ones(3, 2), {}, "ids must be from 0 and below 3, got -1"),
        (torch.tensor([0]), torch.ones(0, 2), {}, "ids must be from 0 and below 0, got 0"),
        (torch.ones(2), torch.ones(3, 2), {}, "ids must be integers, got torch.float32"),
        (torch.tensor([0]), torch.ones(3), {}, r"weight must be \[V, D\], got shape \(3,\)"),
        (torch.tensor([0]), torch.ones(3, 2).int(), {}, "weight must be of floating point, got"),
        (torch.tensor([0]), torch.ones(3, 2), {"dtype": torch.int8}, "dtype must be of floating"),
        (torch.tensor([0]), torch.ones(3, 2, device="meta"), {}, "ids must be on meta, got cpu"),
    ],
)
def test_wrong_inputs(op: Backend, ids: Tensor, weight: Tensor, options: dict, line: str) -> None:
    with pytest.raises(InputError, match=f"^embedding: {line}"):
        op(ids, weight, **options)
