"""selected_logprob: the reference, CPU and CUDA kernels against float64; gradients; bits.

A long file: forward and backward, every option of the support, one kernel.
"""

import math

import pytest
import torch
from backends import Backend, backends_of, instruction_sets, native_backends, parameter
from hypothesis import given, settings
from hypothesis import strategies as st
from isas import assert_amx_has_the_bits, assert_same_bits_everywhere
from selected_logprob_cases import (
    BF16,
    DTYPES,
    FLOAT,
    Inputs,
    assert_all_close,
    assert_close,
    digests,
    inputs,
    jittered,
    outputs,
    random_support,
)
from testkit import FULL, examples
from torch import Tensor

from rlir.errors import InputError
from rlir.ops import (
    head_logits,
    head_logits_reference,
    outside_support,
    pack_support,
    sample_tokens,
    selected_logprob,
    selected_logprob_reference,
    unpack_support,
)

CPU = Backend(f"cpu-{[isa for isa in instruction_sets() if isa != 'amx'][-1]}", selected_logprob)
CHECKED = Backend("emu-checked", selected_logprob)
NAMES = ("logprob", "entropy", "d_hidden", "d_weight", "d_bias")

backends = backends_of(selected_logprob, selected_logprob_reference)
native = native_backends(selected_logprob)
native_and_checked = pytest.mark.parametrize("op", [*native, parameter(CHECKED)])
cuda_backends = backends_of(
    selected_logprob,
    selected_logprob_reference,
    only=lambda op: op.is_emulated or op.name == "cuda",
)
dtypes = pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES.keys())


def plain(hidden, weight, targets, *, bias=None, temperature=1.0, vocab_range=None, support=None):
    """What a trainer without fused ops does: logits in the operands' dtype, softmax in float32."""
    common = torch.promote_types(hidden.dtype, weight.dtype)
    logits = hidden.to(common) @ weight.to(common).t()
    z = (logits if bias is None else logits + bias).float() / temperature
    inside = torch.ones_like(z, dtype=torch.bool)
    if vocab_range is not None:
        inside[:, : vocab_range[0]] = False
        inside[:, vocab_range[1] :] = False
    if support is not None:
        inside &= unpack_support(support, z.shape[1])
    logp = z.masked_fill(~inside, -math.inf).log_softmax(-1)
    entropy = -(logp.exp() * logp.where(inside, 0)).sum(-1)
    return logp.gather(1, targets[:, None])[:, 0], entropy


# --- Values --------------------------------------------------------------------------------------


def check_against_float64(op: Backend, *cases: Inputs, **options) -> None:
    def exact(x: Inputs) -> list[Tensor]:
        return outputs(selected_logprob_reference, x, double=True, **options)

    def largest(differences: list[Tensor]) -> float:
        return max((float(d.abs().max()) for d in differences if d.numel()), default=0.0)

    got = [outputs(op, x, **options) for x in cases]
    peer = [outputs(plain, x, **options) for x in cases]
    truth = [exact(x) for x in cases]
    moved = [exact(jittered(x)) for x in cases]
    for i, name in enumerate(NAMES[: len(truth[0])]):
        moves = largest([m[i] - t[i] for m, t in zip(moved, truth, strict=True)])
        ulp = torch.finfo(FLOAT).eps * largest([t[i] for t in truth])
        of_cases = [(a[i], b[i], c[i]) for a, b, c in zip(got, peer, truth, strict=True)]
        assert_all_close(of_cases, name, 2 * moves + ulp)


@backends
@dtypes
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (2, 7, 9), (19, 33, 257), (99, 65, 300), (40, 520, 60)]
)
def test_matches_float64(op: Backend, dtypes: tuple, shape: tuple[int, int, int]) -> None:
    if op == CHECKED and shape[0] * shape[1] > 5000:
        pytest.skip("the plain emulator has it")
    check_against_float64(op, inputs(*shape, dtypes))
    check_against_float64(op, inputs(*shape, dtypes), bias=False, temperature=0.6)


@backends
@dtypes
def test_support_matches_float64(op: Backend, dtypes: tuple) -> None:
    x = inputs(49, 24, 600, dtypes)
    x.targets = x.targets.clamp(101, 540)
    for options in ({"vocab_range": (101, 541)}, {"support": random_support(x)}):
        check_against_float64(op, x, **options)
    both = {"vocab_range": (101, 541), "support": random_support(x), "temperature": 1.7}
    check_against_float64(op, x, **both)


@pytest.mark.parametrize("op", native)
@settings(max_examples=examples(60), deadline=None, derandomize=not FULL)
@given(
    n=st.integers(0, 60),
    h=st.integers(1, 70),
    v=st.integers(1, 600),
    name=st.sampled_from(sorted(DTYPES)),
    temperature=st.sampled_from([1.0, 0.3, 2.5]),
    data=st.data(),
)
def test_any_shape(
    op: Backend, n: int, h: int, v: int, name: str, temperature: float, data: st.DataObject
) -> None:
    low = data.draw(st.integers(0, v - 1))
    high = data.draw(st.integers(low + 1, v))
    cases = [inputs(n, h, v, DTYPES[name], seed=i) for i in range(60 // max(n, 1))]
    support = data.draw(st.booleans())
    for x in cases:
        x.targets = x.targets.clamp(low, high - 1)
        if support:
            x.options["support"] = random_support(x, n)
    options: dict = {"temperature": temperature, "vocab_range": (low, high)}
    check_against_float64(op, *cases, bias=data.draw(st.booleans()), **options)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_shape_in_the_emulator(data: st.DataObject) -> None:
    n, h, v = (data.draw(st.integers(*range_)) for range_ in ((20, 80), (1, 70), (1, 600)))
    low = data.draw(st.integers(0, v - 1))
    high = data.draw(st.integers(low + 1, v))
    x = inputs(n, h, v, DTYPES[data.draw(st.sampled_from(sorted(DTYPES)))])
    x.targets = x.targets.clamp(low, high - 1)
    if data.draw(st.booleans()):
        x.options["support"] = random_support(x, n)
    options: dict = {"temperature": 0.7, "vocab_range": (low, high)}
    check_against_float64(CHECKED, x, bias=data.draw(st.booleans()), **options)


def test_reference_passes_gradcheck() -> None:
    x = inputs(5, 4, 9)
    support = random_support(x)

    def call(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return selected_logprob_reference(
            hidden, weight, x.targets, bias=bias, temperature=0.8, support=support
        )

    leaves = [t.double().requires_grad_() for t in (x.hidden, x.weight, x.bias)]
    assert torch.autograd.gradcheck(call, leaves)


@backends
def test_hostile_values(op: Backend) -> None:
    x = inputs(6, 8, 300)
    x.weight[7] = 1e4  # a logit that decides alone
    x.hidden[1] = 0  # a uniform row
    x.hidden[2] = torch.nan
    x.hidden[3] *= 1e30
    logprob, entropy = op(x.hidden, x.weight, x.targets)
    expected, spread = selected_logprob_reference(x.hidden, x.weight, x.targets)
    torch.testing.assert_close(logprob, expected, equal_nan=True, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(entropy, spread, equal_nan=True, rtol=1e-5, atol=1e-5)
    assert logprob[2].isnan()
    assert entropy[1].item() == pytest.approx(math.log(300))


# --- Gradients -----------------------------------------------------------------------------------


@backends
def test_each_output_alone_has_its_gradient(op: Backend) -> None:
    x = inputs(20, 16, 90)
    both = outputs(op, x)[2:]
    zero = torch.zeros(20)
    d_logprob, d_entropy = x.d_logprob, x.d_entropy
    parts = []
    for index, weight in ((0, d_logprob), (1, d_entropy)):
        leaves = [t.detach().requires_grad_() for t in (x.hidden, x.weight, x.bias)]
        with op.active():
            out = op(leaves[0], leaves[1], x.targets, bias=leaves[2])[index]
            out.backward(weight)
        parts.append([leaf.grad for leaf in leaves])
        x.d_logprob, x.d_entropy = (weight, zero) if index == 0 else (zero, weight)
        for name, a, b in zip(NAMES[2:], parts[-1], outputs(op, x)[2:], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, msg=name)
    for whole, a, b in zip(both, *parts, strict=True):
        torch.testing.assert_close(whole, a + b, rtol=1e-4, atol=1e-5)


@backends
def test_only_what_is_needed_gets_a_gradient(op: Backend) -> None:
    x = inputs(20, 16, 90)
    whole = outputs(op, x)[2:]
    for needed in range(3):
        leaves = [x.hidden.clone(), x.weight.clone(), x.bias.clone()]
        leaves[needed].requires_grad_()
        with op.active():
            logprob, entropy = op(leaves[0], leaves[1], x.targets, bias=leaves[2])
            ((logprob * x.d_logprob).sum() + (entropy * x.d_entropy).sum()).backward()
        assert leaves[needed].grad is not None
        assert leaves[needed].grad.equal(whole[needed])
        assert all(leaf.grad is None for i, leaf in enumerate(leaves) if i != needed)


@backends
def test_broadcast_gradients(op: Backend) -> None:
    x = inputs(20, 16, 90)
    results = []
    for weight in (torch.tensor(0.5).expand(20), torch.full((20,), 0.5)):
        hidden = x.hidden.clone().requires_grad_()
        with op.active():
            logprob, entropy = op(hidden, x.weight, x.targets)
            torch.autograd.backward([logprob, entropy], [weight, weight])
        results.append(hidden.grad)
    assert results[0].equal(results[1])


@backends
def test_without_entropy(op: Backend) -> None:
    x = inputs(20, 16, 90)
    hidden = x.hidden.clone().requires_grad_()
    with op.active():
        logprob, entropy = op(hidden, x.weight, x.targets, compute_entropy=False)
        assert entropy is None
        assert logprob.equal(op(x.hidden, x.weight, x.targets)[0])
        logprob.backward(x.d_logprob)
    x.d_entropy = torch.zeros(20)
    torch.testing.assert_close(hidden.grad, outputs(op, x, bias=False)[2], rtol=1e-5, atol=1e-6)


# --- Supports ------------------------------------------------------------------------------------


@backends
@dtypes
def test_target_outside_of_the_support(op: Backend, dtypes: tuple) -> None:
    x = inputs(30, 12, 200, dtypes)
    x.targets = x.targets.clamp(50, 149)
    mask = torch.ones(30, 200, dtype=torch.bool)
    mask[4, x.targets[4]] = False
    x.targets[9], x.targets[20] = 3, 180
    hidden, weight = x.hidden.clone().requires_grad_(), x.weight.clone().requires_grad_()
    with op.active():
        logprob, entropy = op(
            hidden, weight, x.targets, vocab_range=(50, 150), support=pack_support(mask)
        )
        # What arrives where the target is outside must not matter.
        logprob.backward(torch.where(logprob.detach().isneginf(), torch.nan, 1.0))
    outside = torch.tensor([i in (4, 9, 20) for i in range(30)])
    assert logprob.isneginf().equal(outside)
    assert int(outside_support(logprob)) == 3
    assert entropy.isfinite().all()
    assert hidden.grad is not None
    assert hidden.grad[outside].eq(0).all()
    assert hidden.grad[~outside].ne(0).any(-1).all()
    assert weight.grad is not None
    assert weight.grad.isfinite().all()
    assert weight.grad[:50].eq(0).all()
    assert weight.grad[150:].eq(0).all()


@backends
def test_entropy_has_its_gradient_where_the_target_is_outside(op: Backend) -> None:
    x = inputs(4, 12, 60)
    x.targets[:] = 59
    hidden = x.hidden.clone().requires_grad_()
    with op.active():
        logprob, entropy = op(hidden, x.weight, x.targets, vocab_range=(0, 50))
        assert logprob.isneginf().all()
        entropy.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.ne(0).any(-1).all()


@backends
@pytest.mark.parametrize(
    "options", [{"top_k": 7}, {"top_p": 0.6}, {"top_k": 30, "top_p": 0.9, "vocab_range": (20, 333)}]
)
def test_truncation_is_that_of_its_support(op: Backend, options: dict) -> None:
    x = inputs(6 if op.is_emulated else 60, 16, 400)
    with op.active():
        logits = head_logits(x.hidden, x.weight, bias=x.bias)
        drawn = sample_tokens(logits, seed=1, offset=0, return_support=True, **options)
    x.targets, support = drawn[0], drawn[3]
    fixed = {k: v for k, v in options.items() if k == "vocab_range"}
    truncated, recorded = outputs(op, x, **options), outputs(op, x, support=support, **fixed)
    for a, b in zip(truncated, recorded, strict=True):
        if not op.is_reference:
            assert a.equal(b)
        else:
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("op", [*native, parameter(Backend("emu", selected_logprob))])
@dtypes
@pytest.mark.parametrize("temperature", [1.0, 0.73])
def test_scores_are_the_samplers_bit_for_bit(
    op: Backend, dtypes: tuple, temperature: float
) -> None:
    x = inputs(5 if op.is_emulated else 70, 40, 1111, dtypes)
    with op.active():
        scores_are_the_samplers(x, temperature)


def scores_are_the_samplers(x: Inputs, temperature: float) -> None:
    logits = head_logits(x.hidden, x.weight, bias=x.bias)
    for options in ({}, {"top_p": 0.8}, {"top_k": 9, "min_p": 0.1}, {"vocab_range": (300, 999)}):
        token, logprob, entropy, support = sample_tokens(
            logits, temperature=temperature, seed=5, offset=1, return_support=True, **options
        )
        again = selected_logprob(
            x.hidden, x.weight, token, bias=x.bias, temperature=temperature, support=support
        )
        assert again[0].equal(logprob)
        assert again[1].equal(entropy)


@pytest.mark.parametrize("dtype", [FLOAT, BF16])
def test_identity_head_scores_given_logits(dtype: torch.dtype) -> None:
    logits = (torch.randn(17, 300) * 3).to(dtype)
    token, logprob, entropy = sample_tokens(logits, seed=0, offset=0)
    again = selected_logprob(logits, torch.eye(300, dtype=dtype), token)
    assert again[0].equal(logprob)
    assert again[1].equal(entropy)


# --- Layouts -------------------------------------------------------------------------------------


def restrided(x: Tensor) -> list[Tensor]:
    wide = torch.zeros(len(x), 3 * x.shape[1] + 1, dtype=x.dtype)[:, 1::3]
    odd = torch.zeros(len(x), x.shape[1] + 1, dtype=x.dtype)[:, 1:]
    return [x.t().contiguous().t(), wide.copy_(x), odd.copy_(x)]


@dtypes
@native_and_checked
def test_strides_do_not_matter(op: Backend, dtypes: tuple) -> None:
    x = inputs(21, 18, 270, dtypes)
    expected = outputs(op, x)
    support = random_support(x)
    masked = outputs(op, x, support=support)
    for hidden, weight in zip(restrided(x.hidden), restrided(x.weight), strict=True):
        y = Inputs(
            hidden,
            weight,
            torch.stack([x.targets, x.targets], 1)[:, 0],
            torch.stack([x.bias, x.bias], 1)[:, 0],
            x.d_logprob,
            x.d_entropy,
        )
        assert not y.targets.is_contiguous()
        for a, b in zip(outputs(op, y), expected, strict=True):
            assert a.equal(b)
        wide = torch.cat([support, support], 1)[:, : support.shape[1]]
        for a, b in zip(outputs(op, y, support=wide), masked, strict=True):
            assert a.equal(b)
    one = x.hidden[:1].expand(21, -1)
    lp = op(one, x.weight, x.targets)[0]
    assert lp.equal(op(one.contiguous(), x.weight, x.targets)[0])


@backends
def test_empty(op: Backend) -> None:
    x = inputs(0, 4, 7)
    logprob, entropy, d_hidden, d_weight, d_bias = outputs(op, x)
    assert logprob.shape == entropy.shape == (0,)
    assert d_hidden.shape == (0, 4)
    assert d_weight.eq(0).all()
    assert d_weight.shape == (7, 4)
    assert d_bias.eq(0).all()
    with op.active():
        assert head_logits(x.hidden, x.weight).shape == (0, 7)
    assert op(x.hidden, x.weight, x.targets, top_p=0.5)[0].shape == (0,)
    y = inputs(3, 0, 8)  # no depth: a uniform distribution
    for tensor in op(y.hidden, y.weight, y.targets):
        torch.testing.assert_close(tensor.abs(), torch.full((3,), math.log(8)))


# --- The same bits -------------------------------------------------------------------------------


@pytest.mark.parametrize("op", native)
@dtypes
def test_bits_do_not_depend_on_the_rest_of_the_batch(op: Backend, dtypes: tuple) -> None:
    x = inputs(401, 40, 530, dtypes)
    logprob, entropy, d_hidden, *_ = outputs(op, x, top_p=0.9)
    with op.active():
        logits = head_logits(x.hidden, x.weight)
    for rows in (slice(0, 1), slice(47, 50), slice(120, 401), torch.randperm(401)[:33]):
        y = Inputs(
            x.hidden[rows], x.weight, x.targets[rows], x.bias, x.d_logprob[rows], x.d_entropy[rows]
        )
        part = outputs(op, y, top_p=0.9)
        assert part[0].equal(logprob[rows])
        assert part[1].equal(entropy[rows])
        assert part[2].equal(d_hidden[rows])
        with op.active():
            assert head_logits(y.hidden, y.weight).equal(logits[rows])


@cuda_backends
@dtypes
def test_bits_do_not_depend_on_the_rest_of_the_batch_on_cuda(op: Backend, dtypes: tuple) -> None:
    x = inputs(140, 24, 300, dtypes)
    whole = outputs(op, x)
    for rows in (slice(0, 1), slice(62, 67), torch.tensor([139, 3])):
        y = Inputs(
            x.hidden[rows], x.weight, x.targets[rows], x.bias, x.d_logprob[rows], x.d_entropy[rows]
        )
        part = outputs(op, y)
        for got, all_rows in zip(part[:3], whole[:3], strict=True):
            assert got.equal(all_rows[rows])


@cuda_backends
@pytest.mark.parametrize("name", [n for n in DTYPES if n != "bfloat16"])
@pytest.mark.parametrize("shape", [(3, 5, 7), (70, 150, 300), (20, 33, 2400)])
def test_the_cuda_kernels_give_the_bits_of_the_cpu_without_tensor_cores(
    op: Backend, name: str, shape: tuple[int, int, int]
) -> None:
    """All but the gradient of the bias, whose sum over rows has another order."""
    if op == CHECKED and shape[0] == 70:
        pytest.skip("the plain emulator has it")
    x = inputs(*shape, DTYPES[name])
    low, high = shape[2] // 3, shape[2] - 1
    x.targets = x.targets.clamp(low, high - 1)
    options = {"vocab_range": (low, high), "temperature": 0.7, "support": random_support(x)}
    got, want = outputs(op, x, **options), outputs(CPU, x, **options)
    for of, a, b in zip(NAMES[:-1], got, want, strict=False):
        assert a.equal(b), of
    torch.testing.assert_close(got[-1], want[-1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("target", [-1, 7])
def test_the_cuda_kernel_asserts_what_it_cannot_say(target: int) -> None:
    x = inputs(3, 4, 7)
    x.targets[1] = target
    with pytest.raises(InputError, match="device assertion: selected_logprob: targets must be"):
        CHECKED(x.hidden, x.weight, x.targets)
    none = torch.zeros(3, 1, dtype=torch.uint8)
    with pytest.raises(InputError, match="device assertion: selected_logprob: support must hold"):
        CHECKED(x.hidden, x.weight, x.targets.clamp(0, 6), support=none)


def test_bits_do_not_depend_on_instruction_set_or_threads() -> None:
    """Also in bfloat16, also through vdpbf16ps; with sample_tokens and head_logits."""
    assert_same_bits_everywhere("selected_logprob_cases.py", "bfloat16 ")


@pytest.mark.parametrize("op", native[1:])
def test_bits_on_amx_do_not_depend_on_threads(op: Backend) -> None:
    """They differ from the others' only where both operands are bfloat16."""
    with CPU.active():
        others = digests()
    threads = torch.get_num_threads()
    with op.active():
        found = digests()
        torch.set_num_threads(3)
        try:
            assert digests() == found
        finally:
            torch.set_num_threads(threads)
    assert_amx_has_the_bits(found, others, "bfloat16 ")
    assert found["bfloat16 0"] != others["bfloat16 0"]  # tiles did run


# --- head_logits ---------------------------------------------------------------------------------


@native_and_checked
@dtypes
def test_head_logits(op: Backend, dtypes: tuple) -> None:
    for shape in ((1, 3, 2), (17, 600, 300), (50, 31, 257)):
        x = inputs(*shape, dtypes)
        truth = head_logits_reference(x.hidden.double(), x.weight.double(), bias=x.bias)
        peer = head_logits_reference(x.hidden, x.weight, bias=x.bias)
        with op.active():
            got = head_logits(x.hidden, x.weight, bias=x.bias)
        assert_close(got, peer, truth)
