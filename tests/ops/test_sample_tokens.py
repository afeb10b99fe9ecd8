"""sample_tokens: the reference, CPU and CUDA kernels; supports, draws, bits.

Bits across instruction sets and threads: test_selected_logprob.py, whose digests hold both ops.
"""

import math

import numpy as np
import pytest
import torch
from backends import Backend, backends_of
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from testkit import FULL, examples, same
from torch import Tensor

from rlir.ops import (
    pack_support,
    sample_tokens,
    sample_tokens_reference,
    unpack_support,
)
from rlir.ops._noise import draw_uniform

CHECKED = Backend("emu-checked", sample_tokens)

backends = backends_of(sample_tokens, sample_tokens_reference)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])

TRUNCATIONS: list[dict] = [
    {},
    {"top_p": 0.8},
    {"top_p": 0.05},
    {"top_p": 1.0},
    {"top_k": 1},
    {"top_k": 50},
    {"top_k": 10**6},
    {"min_p": 0.1},
    {"top_k": 40, "top_p": 0.7, "min_p": 0.02},
    {"temperature": 0.4, "top_p": 0.9},
    {"vocab_range": (5, 900), "top_k": 17, "temperature": 3.0},
]
truncations = pytest.mark.parametrize("options", TRUNCATIONS, ids=str)


def logits_of(n: int, v: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(n, v, generator=g) * 2.5).to(dtype)


def rows_for(op: Backend, rows: int) -> int:
    """The emulator runs one thread after another."""
    return min(rows, 4) if op.is_emulated else rows


def exact(logits: Tensor, support: Tensor, temperature: float = 1.0) -> tuple[np.ndarray, Tensor]:
    """log p in float64, -inf outside of the support, and the support as a bool mask."""
    inside = unpack_support(support, logits.shape[1])
    z = (logits.double() / temperature).masked_fill(~inside, -math.inf)
    return z.log_softmax(-1).numpy(), inside


# --- Random numbers ------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4000, 7), (2000, 257)])
def test_kernel_draws_with_those_numbers(shape: tuple[int, int]) -> None:
    """With equal logits the token is floor(u V)."""
    n, v = shape
    ids = torch.arange(n) * 7919 + 2**40
    token = sample_tokens(torch.zeros(shape), seed=2**62 + 3, offset=2**31 + 1, row_ids=ids)[0]
    u = draw_uniform(2**62 + 3, 2**31 + 1, ids)
    assert token.equal((u * v).floor().long())


# --- Supports and values -------------------------------------------------------------------------


@dtypes
@truncations
@pytest.mark.parametrize("shape", [(40, 1000), (33, 4099)])
def test_agrees_with_the_reference(dtype: torch.dtype, options: dict, shape: tuple) -> None:
    x = logits_of(*shape, dtype)
    got = sample_tokens(x, seed=1, offset=2, return_support=True, **options)
    expected = sample_tokens_reference(x, seed=1, offset=2, return_support=True, **options)
    same = got[3].eq(expected[3]).all(-1)  # where top_p falls on a rounding error, one may differ
    assert int((~same).sum()) <= 1
    assert int((got[0] != expected[0]).sum()) <= 1 + int((~same).sum())
    equal = same & (got[0] == expected[0])
    for a, b in zip(got[1:3], expected[1:3], strict=True):
        torch.testing.assert_close(a[equal], b[equal], rtol=1e-5, atol=4e-6)


@backends
@dtypes
@truncations
def test_values_are_exact_on_the_support(op: Backend, dtype: torch.dtype, options: dict) -> None:
    n = rows_for(op, 31)
    x = logits_of(n, 1000, dtype, seed=4)
    token, logprob, entropy, support = op(x, seed=3, offset=0, return_support=True, **options)
    assert support.shape == (n, 125)
    logp, inside = exact(x, support, options.get("temperature", 1.0))
    assert inside.gather(1, token[:, None]).all()
    truth = logp[np.arange(n), token.numpy()]
    peer = torch.from_numpy(logp).float().numpy()  # the rounding of the result itself
    allowed = np.abs(peer[np.isfinite(peer)] - logp[np.isfinite(logp)]).max() + 1.2e-6
    assert np.abs(logprob.numpy() - truth).max() <= 2 * allowed
    h = -(np.exp(logp) * np.where(inside.numpy(), logp, 0)).sum(-1)
    assert np.abs(entropy.numpy() - h).max() <= 4e-6


@backends
@dtypes
def test_top_k_keeps_k_and_breaks_ties_by_the_lower_token(op: Backend, dtype: torch.dtype) -> None:
    x = logits_of(rows_for(op, 50), 700, dtype).round()  # a few distinct values
    for k in (1, 2, 35, 300, 699):
        inside = unpack_support(op(x, top_k=k, seed=0, offset=0, return_support=True)[3], 700)
        order = x.float().sort(dim=-1, descending=True, stable=True).indices[:, :k]
        assert inside.equal(torch.zeros_like(inside).scatter_(1, order, True))


@backends
def test_top_p_is_the_smallest_set(op: Backend) -> None:
    x = logits_of(rows_for(op, 200), 500)
    for p in (0.1, 0.5, 0.9, 0.999):
        inside = unpack_support(op(x, top_p=p, seed=0, offset=0, return_support=True)[3], 500)
        prob = x.double().softmax(-1)
        mass = (prob * inside).sum(-1)
        assert (mass >= p - 1e-6).all()
        least = prob.masked_fill(~inside, 2.0).amin(-1)
        assert (mass - least < p + 1e-6).all()  # without its least likely token it is too small
        assert (prob.masked_fill(inside, 0.0).amax(-1) <= least).all()


@backends
def test_top_p_of_ties(op: Backend) -> None:
    x = torch.zeros(1, 1000)
    inside = unpack_support(op(x, top_p=0.25, seed=0, offset=0, return_support=True)[3], 1000)
    assert inside[0].nonzero().flatten().equal(torch.arange(250))
    x[0, 600:] = 1.0
    inside = unpack_support(op(x, top_k=250, seed=0, offset=0, return_support=True)[3], 1000)
    assert inside[0].nonzero().flatten().equal(torch.arange(600, 850))
    mixed = torch.tensor([[0.0, -0.0] * 300])  # one value, two signs
    inside = unpack_support(op(mixed, top_k=77, seed=0, offset=0, return_support=True)[3], 600)
    assert inside[0].nonzero().flatten().equal(torch.arange(77))


@backends
def test_order_of_truncation(op: Backend) -> None:
    """top_p of the top_k, as transformers does: masses .5 .3 .2 -> of the first two .625 .375."""
    x = torch.tensor([[0.5, 0.3, 0.2]]).log()

    def support(**options) -> list[bool]:
        out = op(x, seed=0, offset=0, return_support=True, **options)
        return unpack_support(out[3], 3)[0].tolist()

    assert support(top_p=0.6) == [True, True, False]
    assert support(top_k=2, top_p=0.6) == [True, False, False]
    assert support(min_p=0.5) == [True, True, False]
    assert support(min_p=1.0) == [True, False, False]
    assert support(top_p=0.6, min_p=0.7) == [True, False, False]


@backends
@pytest.mark.parametrize("options", [{"top_p": 0.3}, {"top_k": 1}, {"min_p": 1.0}])
def test_both_zeros_are_one_value(op: Backend, options: dict) -> None:
    x = torch.tensor([[-0.0, -0.0], [-0.0, 0.0], [0.0, -0.0], [0.0, 0.0]])
    _, _, entropy, support = op(x, seed=0, offset=0, return_support=True, **options)
    inside = unpack_support(support, 2).tolist()
    assert inside == [[True, "min_p" in options]] * 4
    assert entropy.unique().numel() == 1


@backends
def test_a_log_probability_is_never_minus_zero(op: Backend) -> None:
    """Whichever of 0 and -0 the maximum is taken to be."""
    for x in ([[-0.0, 0.0, -0.0]], [[0.0, -0.0, -0.0]], [[-0.0, -0.0, 0.0]]):
        _, logprob, _ = op(torch.tensor(x), top_k=1, seed=0, offset=0)
        assert not logprob.signbit().any()


@settings(max_examples=examples(80), deadline=None, derandomize=not FULL)
@given(
    v=st.integers(1, 900),
    seed=st.integers(0, 2**20),
    scale=st.sampled_from([0.0, 0.3, 4.0, 60.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    rounds=st.booleans(),
    data=st.data(),
)
def test_any_row(
    v: int, seed: int, scale: float, dtype: torch.dtype, rounds: bool, data: st.DataObject
) -> None:
    x = logits_of(6, v, seed=seed) * scale
    x = (x.round() if rounds else x).to(dtype)
    low = data.draw(st.integers(0, v - 1))
    options: dict = {
        "vocab_range": (low, data.draw(st.integers(low + 1, v))),
        "top_k": data.draw(st.sampled_from([None, 1, 5, 200])),
        "top_p": data.draw(st.sampled_from([None, 0.3, 0.95])),
        "min_p": data.draw(st.sampled_from([None, 0.05])),
        "temperature": data.draw(st.sampled_from([1.0, 0.6])),
    }
    if data.draw(st.booleans()):  # some tokens are forbidden
        x[:, torch.randperm(v, generator=torch.Generator().manual_seed(seed))[: v // 3]] = -math.inf
        x[:, low] = 0
    got = sample_tokens(x, seed=seed, offset=0, return_support=True, **options)
    expected = sample_tokens_reference(x, seed=seed, offset=0, return_support=True, **options)
    inside = unpack_support(got[3], v)
    assert inside.gather(1, got[0][:, None]).all()
    # A disagreement must be a matter of rounding: a token at the border of the nucleus.
    wrong = inside != unpack_support(expected[3], v)
    if options["top_p"] is None and options["min_p"] is None:
        assert not wrong.any()
    assert int(wrong.sum()) <= 2
    equal = ~wrong.any(-1)
    differs = got[0][equal] != expected[0][equal]
    assert int(differs.sum()) <= 1
    torch.testing.assert_close(got[2][equal], expected[2][equal], rtol=1e-5, atol=5e-6)
    ids = torch.arange(2)  # the emulator runs one thread after another
    again = CHECKED(x[:2], seed=seed, offset=0, row_ids=ids, return_support=True, **options)
    assert same(list(again), [part[:2] for part in got])


@backends
def test_hostile_values(op: Backend) -> None:
    x = torch.full((5, 300), -torch.inf)
    x[0, 17] = 3.0  # a single token
    x[1] = 1e30
    x[2] = torch.linspace(-1e30, 1e30, 300)
    x[3, ::2] = -3e38
    x[4] = torch.linspace(-80, 80, 300)
    for options in ({}, {"top_p": 0.9}, {"top_k": 3}, {"top_k": 280, "top_p": 0.999}):
        token, logprob, entropy = op(x, seed=0, offset=0, **options)
        assert token[0] == 17
        assert token[2] == 299
        assert token[3] % 2 == 0
        assert logprob[0] == logprob[2] == 0
        assert entropy[0] == entropy[2] == 0
        assert logprob.isfinite().all()
        assert entropy.isfinite().all()


# --- Draws ---------------------------------------------------------------------------------------


@backends
@pytest.mark.parametrize("options", [{}, {"top_p": 0.8}, {"top_k": 6, "temperature": 1.5}])
def test_frequencies_are_the_probabilities(op: Backend, options: dict) -> None:
    if op.is_emulated:
        pytest.skip("many rows; its draws are the CPU's, bit for bit")
    n = 20_000
    row = torch.tensor([[1.0, 0.0, -1.0, 2.0, 0.5, -3.0, 1.5, 0.2, -0.7, 0.9]])
    token, logprob, _, support = op(
        row.expand(n, -1), seed=11, offset=7, return_support=True, **options
    )
    logp, inside = exact(row, support[:1], options.get("temperature", 1.0))
    counts = torch.bincount(token, minlength=10).numpy()
    keep = inside[0].numpy()
    assert counts[~keep].sum() == 0
    assert stats.chisquare(counts[keep], n * np.exp(logp[0][keep])).pvalue > 1e-3
    np.testing.assert_allclose(logprob.numpy(), logp[0][token.numpy()], atol=1e-6)


def test_frequencies_over_a_large_vocabulary() -> None:
    """5000 tokens, 200,000 draws: cells by token, and neighbours in time are independent."""
    row = logits_of(1, 5000, seed=9)
    draws = [
        sample_tokens(row.expand(20_000, -1), seed=5, offset=i, top_p=0.95)[0] for i in range(10)
    ]
    token = torch.stack(draws)
    inside = unpack_support(
        sample_tokens(row, seed=0, offset=0, top_p=0.95, return_support=True)[3], 5000
    )
    prob = row.double().masked_fill(~inside, -math.inf).softmax(-1)[0]
    cells = torch.arange(5000) % 97
    expected = torch.zeros(97, dtype=torch.float64).index_add_(0, cells, prob) * token.numel()
    counts = torch.bincount(cells[token].flatten(), minlength=97).numpy()
    assert stats.chisquare(counts, expected.numpy()).pvalue > 1e-3
    half = token < 2500
    for a, b in ((half[:, 1:], half[:, :-1]), (half[1:], half[:-1])):  # rows, offsets
        pairs = torch.bincount((a.long() * 2 + b.long()).flatten(), minlength=4).view(2, 2)
        assert stats.chi2_contingency(pairs.numpy()).pvalue > 1e-3


@backends
def test_a_draw_is_of_seed_row_and_offset(op: Backend) -> None:
    n = rows_for(op, 64)
    x = logits_of(n, 300)
    base = op(x, seed=1, offset=1)
    assert op(x, seed=1, offset=1)[0].equal(base[0])
    for other in ({"seed": 2, "offset": 1}, {"seed": 1, "offset": 2}):
        assert (op(x, **other)[0] != base[0]).float().mean() > 0.5
    ids = torch.arange(100, 100 + n)
    assert (op(x, seed=1, offset=1, row_ids=ids)[0] != base[0]).float().mean() > 0.5
    tensors = {"seed": torch.tensor(1), "offset": torch.tensor([1])}
    for a, b in zip(op(x, **tensors), base, strict=True):
        assert a.equal(b)


@dtypes
@truncations
def test_bits_do_not_depend_on_the_rest_of_the_batch(dtype: torch.dtype, options: dict) -> None:
    x = logits_of(37, 1000, dtype)
    ids = torch.arange(37) * 5 + 2
    whole = sample_tokens(x, seed=4, offset=9, row_ids=ids, return_support=True, **options)
    for rows in (slice(0, 1), slice(5, 30), torch.randperm(37)):
        part = sample_tokens(
            x[rows], seed=4, offset=9, row_ids=ids[rows], return_support=True, **options
        )
        for a, b in zip(part, whole, strict=True):
            assert a.equal(b[rows])


@dtypes
@truncations
def test_the_cuda_kernel_gives_the_bits_of_the_cpu(dtype: torch.dtype, options: dict) -> None:
    ids, more = torch.tensor([2**40, -3, 7]), {"seed": 2**62, "offset": 5, "return_support": True}
    for x in (
        logits_of(3, 1000, dtype),
        logits_of(3, 2049, dtype, seed=1).round(),  # ties; rows that are not aligned
        logits_of(3, 1800, dtype)[:, ::2],
    ):
        want = sample_tokens(x, row_ids=ids, **more, **options)
        assert same(CHECKED(x, row_ids=ids, **more, **options), want)


@dtypes
def test_a_large_vocabulary_lies_in_workspace(dtype: torch.dtype) -> None:
    x = logits_of(1, 40_000, dtype)
    for options in ({"top_p": 0.8}, {"top_k": 900, "vocab_range": (300, 39_999)}):
        want = sample_tokens(x, seed=3, offset=4, return_support=True, **options)
        got = Backend("emu", sample_tokens)(x, seed=3, offset=4, return_support=True, **options)
        assert same(got, want)


def test_strides_do_not_matter() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x = logits_of(9, 600, dtype)
        expected = sample_tokens(x, seed=1, offset=0, top_p=0.7)
        wide = torch.zeros(9, 1201, dtype=dtype)[:, 1::2]
        ids = torch.arange(18)[::2] // 2
        for y in (x.t().contiguous().t(), wide.copy_(x)):
            for a, b in zip(
                sample_tokens(y, seed=1, offset=0, top_p=0.7, row_ids=ids), expected, strict=True
            ):
                assert a.equal(b)
        one = sample_tokens(x[:1].expand(9, -1), seed=1, offset=0)
        assert one[0].equal(sample_tokens(x[:1].repeat(9, 1), seed=1, offset=0)[0])


@backends
def test_empty(op: Backend) -> None:
    out = op(torch.zeros(0, 20), seed=0, offset=0, return_support=True, top_p=0.5)
    assert [tuple(t.shape) for t in out] == [(0,), (0,), (0,), (0, 3)]
    assert [t.dtype for t in out] == [torch.int64, torch.float32, torch.float32, torch.uint8]
    assert len(op(torch.zeros(2, 20), seed=0, offset=0)) == 3
    assert not op(torch.zeros(2, 20, requires_grad=True), seed=0, offset=0)[1].requires_grad


def test_support_bits() -> None:
    for v in (1, 7, 8, 9, 700):
        mask = torch.rand(5, v) < 0.5
        packed = pack_support(mask)
        assert packed.numpy().tobytes() == np.packbits(mask, axis=1, bitorder="little").tobytes()
        assert unpack_support(packed, v).equal(mask)
