"""flow_sde_step: the reference, CPU and CUDA kernels against the published formulas.

This file is longer than most: one parametrisation over all backends serves values, noise,
gradients and errors.
"""

import math
from collections.abc import Callable

import pytest
import torch
from backends import Backend, backends_of
from flow_cases import DTYPES, SCHEDULES, assert_close, latents, published
from hypothesis import given, settings
from hypothesis import strategies as st
from isas import assert_same_bits_everywhere
from scipy import stats
from testkit import examples, same
from torch import Tensor

from rlir.errors import InputError
from rlir.ops import FlowStep, flow_sde_step, flow_sde_step_reference
from rlir.ops._noise import normals, philox

CHECKED = Backend("emu-checked", flow_sde_step)
backends = backends_of(flow_sde_step, flow_sde_step_reference)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
schedules = pytest.mark.parametrize(("schedule", "a"), SCHEDULES)
STEPS = [(0.7, 0.6), (1.0, 0.9), (0.3, 0.0), (1.0, 0.0)]
Op = Callable[..., FlowStep]


def skip_costly(op: Backend, costly: bool) -> None:
    """The emulator runs one thread after another."""
    if op.is_emulated and costly:
        pytest.skip("other cases have the emulator take the same ways")


# --- Values --------------------------------------------------------------------------------------


@backends
@schedules
@dtypes
@pytest.mark.parametrize(("sigma", "then"), STEPS)
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (3, 1), (1, 4097), (4, 9000)])
def test_is_the_published_formula(
    op: Backend,
    schedule: str,
    a: float,
    dtype: torch.dtype,
    sigma: float,
    then: float,
    shape: tuple[int, ...],
) -> None:
    skip_costly(op, len(shape) == 2 and shape[1] > 1 and sigma != 0.7)
    v, x, later = latents(*shape, dtype=dtype)
    step = op(v, x, sigma, then, schedule=schedule, noise_level=a, previous=later)
    real = torch.float64 if dtype == torch.float64 else torch.float32
    wide = [t.double() for t in (v, x)]
    truth = published(schedule, *wide, sigma, then, a, later.double())
    peer = published(schedule, v.to(real), x.to(real), sigma, then, a, later.to(real))
    assert_close(step.mean, peer[0], truth[0])
    assert_close(step.logprob, peer[1], truth[1])
    assert step.next.equal(later)
    assert step.std.dtype == real
    torch.testing.assert_close(step.std, torch.full_like(step.std, truth[2]))


@backends
@schedules
@dtypes
@pytest.mark.parametrize(("sigma", "then"), STEPS)
def test_a_draw_scores_as_it_says_bit_for_bit(
    op: Backend, schedule: str, a: float, dtype: torch.dtype, sigma: float, then: float
) -> None:
    skip_costly(op, sigma == 1.0)
    v, x, _ = latents(3, 5, 1700, dtype=dtype)
    options = {"schedule": schedule, "noise_level": a}
    drawn = op(v, x, sigma, then, seed=3, offset=9, **options)
    assert drawn.next.dtype == dtype
    scored = op(v, x, sigma, then, previous=drawn.next, **options)
    assert scored.logprob.equal(drawn.logprob)
    assert scored.mean.equal(drawn.mean)
    spread = (drawn.next.double() - drawn.mean.double()).flatten(1).std(1)
    torch.testing.assert_close(spread, drawn.std.double(), rtol=0.05, atol=0.01)


@backends
def test_velocity_and_sample_may_differ_in_dtype(op: Backend) -> None:
    v, x, later = latents(2, 300)
    low = v.bfloat16()
    step = op(low, x, 0.7, 0.6, noise_level=0.7, previous=later.half())
    same = op(low.float(), x, 0.7, 0.6, noise_level=0.7, previous=later.half().float())
    assert step.mean.equal(same.mean)
    assert step.logprob.equal(same.logprob)
    assert op(low, x.double(), 0.7, 0.6, noise_level=0.7).mean.dtype == torch.float64


@backends
@schedules
def test_sigmas_of_rows_and_row_ids(op: Backend, schedule: str, a: float) -> None:
    v, x, _ = latents(4, 3, 50)
    sigma = torch.tensor([1.0, 0.8, 0.5, 0.2], dtype=torch.float64)
    then = torch.tensor([0.8, 0.5, 0.2, 0.0], dtype=torch.float64)
    ids = torch.tensor([5, 2**40 + 1, 5, 0])
    whole = op(v, x, sigma, then, schedule=schedule, noise_level=a, seed=-1, row_ids=ids)
    for i in range(4):
        alone = op(
            *(t[i : i + 1] for t in (v, x)),
            float(sigma[i]),
            float(then[i]),
            schedule=schedule,
            noise_level=a,
            seed=torch.tensor(-1),
            offset=torch.tensor([0]),
            row_ids=ids[i : i + 1],
        )
        for part, row in zip(whole, alone, strict=True):
            assert part[i : i + 1].equal(row)


@backends
def test_a_step_without_noise_is_the_ode(op: Backend) -> None:
    v, x, later = latents(2, 100)
    v.requires_grad_()
    for schedule in ("flow_grpo", "dance", "cps"):
        step = op(v, x, 0.7, 0.5, schedule=schedule, noise_level=0.0)
        torch.testing.assert_close(step.mean, x - 0.2 * v, rtol=1e-5, atol=1e-6)
        assert step.next.equal(step.mean)
        assert step.std.eq(0).all()
        assert step.logprob.eq(0).all()
    with op.active():
        scored = op(v, x, 0.7, 0.5, noise_level=0.0, previous=later)
        assert scored.logprob.eq(0).all()
        (grad,) = torch.autograd.grad(scored.logprob.sum(), v)
    assert grad.eq(0).all()
    last = op(v, x, 0.7, 0.0, schedule="cps", noise_level=0.8)  # cps ends without noise
    torch.testing.assert_close(last.next, (x - 0.7 * v).detach(), rtol=1e-5, atol=1e-6)


# --- Noise ---------------------------------------------------------------------------------------


def test_philox_is_random123s() -> None:
    """The known answers that come with the published code."""
    known = [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        (
            [0xFFFFFFFF] * 4,
            [0xFFFFFFFF] * 2,
            [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD],
        ),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ]
    for counter, key, words in known:
        got = philox([torch.tensor(c) for c in counter], tuple(map(torch.tensor, key)))
        assert [int(w) for w in got] == words


def noise(rows: int, size: int, **options: object) -> Tensor:
    """The kernel's normals: a step from 0 at velocity 0, of deviation 1."""
    zero = torch.zeros(rows, size)
    return flow_sde_step(zero, zero, 1.0, 0.0, schedule="dance", noise_level=1.0, **options).next


@pytest.mark.parametrize("size", [1, 63, 64, 65, 4095, 10000])
def test_noise_is_the_references(size: int) -> None:
    ids = torch.tensor([0, 7, 2**33, -1])
    for seed, offset in ((0, 0), (2**63 - 1, 2**32 - 1), (-5, 17)):
        got = noise(4, size, seed=seed, offset=offset, row_ids=ids)
        exact = normals(torch.tensor(seed), torch.tensor(offset), ids, size)
        torch.testing.assert_close(got, exact, rtol=4e-6, atol=5e-7)


def test_noise_is_standard_normal() -> None:
    z = noise(4, 250_000, seed=11).double()
    assert abs(z.mean()) < 5 / math.sqrt(z.numel())
    assert abs(z.square().mean() - 1) < 5 * math.sqrt(2 / z.numel())
    assert stats.kstest(z.flatten().numpy()[:100_000], "norm").pvalue > 1e-4
    rows = torch.corrcoef(z) - torch.eye(4)
    assert rows.abs().max() < 5 / math.sqrt(z.shape[1])
    for shift in (1, 16, 32, 48, 64):
        lagged = (z[:, shift:] * z[:, :-shift]).mean()
        assert abs(lagged) < 5 / math.sqrt(z.numel())


def test_noise_depends_on_seed_offset_and_row_alone() -> None:
    base = noise(3, 100, seed=1, offset=2)
    assert base.equal(noise(3, 100, seed=1, offset=2))
    assert base[2].equal(noise(1, 100, seed=1, offset=2, row_ids=torch.tensor([2]))[0])
    assert base[:, :70].equal(noise(3, 70, seed=1, offset=2))
    others = [
        noise(3, 100, seed=2, offset=2),
        noise(3, 100, seed=1 + 2**32, offset=2),
        noise(3, 100, seed=1, offset=3),
        noise(3, 100, seed=1, offset=2, row_ids=torch.arange(3) + 2**32),
    ]
    for other in others:
        assert (other != base).float().mean() > 0.99
    assert (base[0] != base[1]).float().mean() > 0.99


# --- Gradients -----------------------------------------------------------------------------------


@backends
@schedules
@pytest.mark.parametrize(("sigma", "then"), STEPS)
def test_gradcheck(op: Backend, schedule: str, a: float, sigma: float, then: float) -> None:
    skip_costly(op, sigma != 0.7)
    v, x, later = latents(2, 3, 11, dtype=torch.float64)
    v.requires_grad_()

    def scored(velocity: Tensor) -> tuple[Tensor, Tensor]:
        step = op(velocity, x, sigma, then, schedule=schedule, noise_level=a, previous=later)
        return step.logprob, step.mean

    with op.active():
        assert torch.autograd.gradcheck(scored, (v,))


@backends
@schedules
@dtypes
def test_gradients_are_the_references(
    op: Backend, schedule: str, a: float, dtype: torch.dtype
) -> None:
    v, x, later = latents(3, 5000, dtype=dtype)
    wide = [t.double() for t in (v, x, later)]

    def grad(function: Op, inputs: list[Tensor], parts: str) -> Tensor:
        velocity = inputs[0].clone().requires_grad_()
        step = function(
            velocity, inputs[1], 0.7, 0.6, schedule=schedule, noise_level=a, previous=inputs[2]
        )
        loss = 0
        if "l" in parts:
            loss = loss + (step.logprob * torch.tensor([1.0, -2.0, 0.5])).sum()
        if "m" in parts:
            loss = loss + step.mean.sum()  # a gradient of stride 0
        loss.backward()
        return velocity.grad

    for parts in ("l", "m", "lm"):
        with op.active():
            got = grad(op, [v, x, later], parts)
        peer = grad(flow_sde_step_reference, [v, x, later], parts)
        assert_close(got, peer, grad(flow_sde_step_reference, wide, parts))


@backends
def test_a_drawn_sample_is_a_constant(op: Backend) -> None:
    v, x, _ = latents(2, 40)
    v.requires_grad_()
    x.requires_grad_()
    with op.active():
        step = op(v, x, 0.7, 0.6, noise_level=0.7, seed=1)
        assert not step.next.requires_grad
        assert not step.std.requires_grad
        step.logprob.sum().backward()
        again = v.detach().clone().requires_grad_()
        op(again, x, 0.7, 0.6, noise_level=0.7, previous=step.next).logprob.sum().backward()
    assert v.grad.equal(again.grad)
    assert v.grad.abs().max() > 0
    assert x.grad is None


# --- Bits, layouts, registration -----------------------------------------------------------------


def test_bits_do_not_depend_on_instruction_set_or_threads() -> None:
    assert_same_bits_everywhere("flow_cases.py")


@schedules
@dtypes
@pytest.mark.parametrize("shape", [(1, 1), (3, 63), (2, 64), (2, 5, 820), (1, 8193), (1, 140_000)])
def test_the_cuda_kernels_give_the_bits_of_the_cpu(
    schedule: str, a: float, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    """Drawn, scored, and the gradient; 140,000 elements are more chunks than a warp adds."""
    large = shape == (1, 140_000)
    if large and (dtype != torch.float32 or schedule != "dance"):
        pytest.skip("one large row will do")
    backend = Backend("emu", flow_sde_step) if large else CHECKED
    v, x, later = latents(*shape, dtype=dtype, seed=4)
    ids = torch.arange(len(v)) * 2**33 - 1
    options = {"schedule": schedule, "noise_level": a, "seed": -7, "offset": 2**32 - 1}
    options["row_ids"] = ids

    def everything() -> list[Tensor]:
        velocity = v.clone().requires_grad_()
        drawn = flow_sde_step(velocity, x, 0.9, 0.8, **options)
        scored = flow_sde_step(velocity, x, 0.9, 0.8, previous=later, **options)
        (scored.logprob.sum() + 0.5 * scored.mean.sum() + drawn.logprob.sum()).backward()
        return [t.detach() for t in (*drawn, *scored, velocity.grad)]

    want = everything()
    with backend.active():
        got = everything()
    for a_part, b_part in zip(got, want, strict=True):
        assert same(a_part, b_part)


@settings(max_examples=examples(30), deadline=None)
@given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    rows=st.integers(0, 5),
    layout=st.sampled_from(["plain", "moved", "step", "expanded"]),
    pair=st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES)),
    scored=st.booleans(),
)
def test_any_layout(
    shape: list[int],
    rows: int,
    layout: str,
    pair: tuple[torch.dtype, torch.dtype],
    scored: bool,
) -> None:
    def laid_out(t: Tensor) -> Tensor:
        if layout == "moved":
            return t.movedim(0, -1).contiguous().movedim(-1, 0)
        if layout == "step":
            return torch.stack([t, -t], -1)[..., 0]
        return t[..., :1].expand(t.shape) if layout == "expanded" else t

    v, x, later = (laid_out(t) for t in latents(rows, *shape))
    v, x = v.to(pair[0]), x.to(pair[1])
    options = {"noise_level": 0.7, "seed": 4, "previous": later if scored else None}
    got = flow_sde_step(v, x, 0.7, 0.6, **options)
    peer = list(flow_sde_step_reference(v, x, 0.7, 0.6, **options))
    if not scored:
        # Of the sample that was drawn: at the border between two bfloat16 the peer's may be the
        # other one, whose log-probability is another.
        given = {**options, "previous": got[0]}
        peer[1] = flow_sde_step_reference(v, x, 0.7, 0.6, **given)[1]
    for a, b in zip(got, peer, strict=True):
        eps = max(torch.finfo(a.dtype).eps, torch.finfo(torch.float32).eps)
        torch.testing.assert_close(a, b, rtol=8 * eps, atol=16 * eps)
    for a, b in zip(CHECKED(v, x, 0.7, 0.6, **options), got, strict=True):
        assert same(a, b)


def test_opcheck() -> None:
    v, x, later = latents(3, 4, 5)
    s, n = torch.full((3,), 0.7), torch.full((3,), 0.6)
    seed, offset = torch.tensor(1), torch.tensor(2)
    options = {"schedule": "flow_grpo", "noise_level": 0.7}
    op = torch.ops.rlir.flow_sde_step.default
    for previous in (None, later):
        for grad in (False, True):
            inputs = (v.clone().requires_grad_(grad), x, s, n, previous, seed, offset)
            torch.library.opcheck(op, inputs, options)
    rows = (v[:0], x[:0], s[:0], n[:0], None, seed, offset, torch.zeros(0, dtype=torch.int64))
    torch.library.opcheck(op, rows, {**options, "schedule": "cps"})
    back = torch.ops.rlir.flow_sde_step_backward.default
    torch.library.opcheck(back, (torch.ones(3), None, later, x, s, n), options)
    torch.library.opcheck(back, (None, v, later.half(), x, s, n), options)


def test_compiles_once_for_all_sizes_and_offsets() -> None:
    def step(v: Tensor, x: Tensor, offset: Tensor) -> Tensor:
        s = flow_sde_step(v * 2, x, 0.7, 0.6, noise_level=0.7, seed=3, offset=offset)
        return s.next + s.logprob[:, None] + s.mean

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows, size, stance in ((3, 5, "default"), (4, 77, "fail_on_recompile")):
        v, x, _ = latents(rows, size)
        offset = torch.tensor(rows)
        with torch.compiler.set_stance(stance):
            grads = []
            for function in (compiled, step):
                u = v.clone().requires_grad_()
                out = function(u, x, offset)
                out.sum().backward()
                grads.append((out.detach(), u.grad))
            assert grads[0][0].equal(grads[1][0])
            assert grads[0][1].equal(grads[1][1])


# --- Errors --------------------------------------------------------------------------------------

V = torch.zeros(3, 4)
OK: dict = {"noise_level": 0.7}
HOSTILE: list[tuple[tuple, dict, str]] = [
    ((V, V.long(), 0.7, 0.6), OK, "sample must be float64, float32, bfloat16 or float16, got"),
    ((V[:2], V, 0.7, 0.6), OK, "velocity must have the shape of sample, (3, 4), got (2, 4)"),
    ((V.to("meta"), V, 0.7, 0.6), OK, "velocity must be on cpu, got meta"),
    ((V.sum(), V.sum(), 0.7, 0.6), OK, "sample must have rows, got shape ()"),
    ((V[:, :0], V[:, :0], 0.7, 0.6), OK, "sample must have an element a row, got shape (3, 0)"),
    ((V, V, 0.7, 0.6), {**OK, "previous": V.int()}, "previous must be float64, float32,"),
    ((V, V, 0.7, 0.6), {**OK, "schedule": "ode"}, "schedule must be 'flow_grpo', 'dance' or"),
    ((V, V, 0.7, 0.6), {"noise_level": -0.1}, "noise_level must be finite and >= 0, got -0.1"),
    ((V, V, 0.7, 0.6), {"noise_level": math.nan}, "noise_level must be finite and >= 0, got nan"),
    (
        (V, V, 0.7, 0.6),
        {"noise_level": 1.1, "schedule": "cps"},
        "noise_level must be at most 1 for 'cps', got 1.1",
    ),
    ((V, V, 0.0, 0.0), OK, "sigma must be above 0 and at most 1, got 0"),
    ((V, V, 1.5, 0.6), OK, "sigma must be above 0 and at most 1, got 1.5"),
    ((V, V, math.nan, 0.6), OK, "sigma must be above 0 and at most 1, got nan"),
    ((V, V, 0.6, 0.6), OK, "sigma_next must be >= 0 and below sigma, got 0.6 after 0.6"),
    ((V, V, 0.6, -0.1), OK, "sigma_next must be >= 0 and below sigma, got -0.1 after 0.6"),
    ((V, V, torch.zeros(2), 0.6), OK, "sigma must have shape () or (3,), got (2,)"),
    ((V, V, torch.tensor(1), 0.6), OK, "sigma must be float64, float32, bfloat16 or float16"),
    ((V, V, 0.7, 0.6), {**OK, "offset": -1}, "offset must be >= 0 and below 2^32, got -1"),
    ((V, V, 0.7, 0.6), {**OK, "seed": 2**63}, f"seed must be an int64, got {2**63}"),
    ((V, V, 0.7, 0.6), {**OK, "seed": torch.zeros(2)}, "seed must be one int64, got 2 of torch"),
    ((V, V, 0.7, 0.6), {**OK, "row_ids": torch.zeros(3)}, "row_ids must be torch.int64, got"),
    ((V, V, 0.7, 0.6), {**OK, "row_ids": torch.arange(2)}, "row_ids must have shape (3,), got"),
]


@backends
@pytest.mark.parametrize(("args", "options", "message"), HOSTILE)
def test_hostile_inputs(op: Backend, args: tuple, options: dict, message: str) -> None:
    with pytest.raises(InputError) as caught:
        op(*args, **options)
    assert str(caught.value).startswith(f"flow_sde_step: {message}")
    assert len(str(caught.value).splitlines()) == 1


def test_an_offset_in_a_tensor_is_looked_at_by_the_kernel() -> None:
    with pytest.raises(InputError, match="offset must be >= 0 and below 2"):
        flow_sde_step(V, V, 0.7, 0.6, noise_level=0.7, offset=torch.tensor(-1))


@pytest.mark.parametrize(
    ("sigma", "then", "offset", "message"),
    [
        (1.5, 0.6, 0, "sigma must be above 0 and at most 1"),
        (0.7, 0.7, 0, "sigma must be above 0 and at most 1"),
        (0.7, 0.6, -1, "offset must be >= 0 and below 2^32"),
    ],
)
def test_the_cuda_kernel_asserts_what_it_cannot_say(
    sigma: float, then: float, offset: int, message: str
) -> None:
    rows = [torch.full((3,), value) for value in (sigma, then)]
    numbers = [torch.tensor(0), torch.tensor(offset)]
    options = {"schedule": "dance", "noise_level": 0.3}
    with CHECKED.active(), pytest.raises(RuntimeError) as caught:
        torch.ops.rlir.flow_sde_step(V, V, *rows, None, *numbers, None, **options)
    assert f"device assertion: flow_sde_step: {message}" in str(caught.value)


def test_raw_operator_is_safe_from_hostile_inputs() -> None:
    s, n, one = torch.full((3,), 0.7), torch.full((3,), 0.6), torch.tensor(0)
    good = [V, V, s, n, None, one, one, None]
    options = {"schedule": "dance", "noise_level": 0.3}
    op = torch.ops.rlir.flow_sde_step.default
    for place, value, message in (
        (0, V[:2], "velocity must have the shape of sample"),
        (1, V.long(), "sample must be float64, float32, bfloat16 or float16, got dtype"),
        (2, s[:2], "sigma must have shape (3,)"),
        (2, s * 0, "sigma must be above 0 and at most 1, got 0"),
        (3, s, "sigma_next must be >= 0 and below sigma, got 0.7"),
        (4, V[:2], "previous must have the shape of sample"),
        (5, s, "seed must be one int64"),
        (6, one - 1, "offset must be >= 0 and below 2^32, got -1"),
        (7, torch.arange(2), "row_ids must have shape (3,)"),
    ):
        args = list(good)
        args[place] = value
        with pytest.raises(RuntimeError) as caught:
            op(*args, **options)
        assert str(caught.value).startswith(f"flow_sde_step: {message}")
        assert len(str(caught.value).splitlines()) == 1
