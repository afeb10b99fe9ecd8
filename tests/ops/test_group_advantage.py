"""group_advantage: reference, CPU and CUDA kernels against the formula in extended precision."""

import functools
import math
import os
import subprocess
import sys
from itertools import product

import numpy as np
import pytest
import torch
from backends import Backend, backends_of
from cudacheck.emulator import emulated
from group_advantage_cases import (
    BASELINES,
    DTYPES,
    SCALES,
    assert_close,
    exact,
    restride,
    rows_to_groups,
    sample,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st
from isas import assert_same_bits_everywhere
from testkit import FULL, examples, same
from torch import Tensor

from rlir.errors import InputError
from rlir.ops import group_advantage, group_advantage_reference

RAW = torch.ops.rlir.group_advantage.default
CHECKED = Backend("emu-checked", group_advantage)

backends = backends_of(group_advantage, group_advantage_reference)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


@functools.cache
def solved(
    shape: tuple[int, int], dtype: torch.dtype, scale: str, baseline: str
) -> tuple[Tensor, np.ndarray, Tensor]:
    """Rewards, the exact result and PyTorch's: once for all backends."""
    r = sample(*shape, dtype, seed=shape[1])
    truth = exact(r, rows_to_groups(*shape), scale=scale, baseline=baseline)
    return r, truth, group_advantage_reference(r, scale=scale, baseline=baseline)


# --- Values --------------------------------------------------------------------------------------


@backends
@dtypes
@pytest.mark.parametrize("shape", [(1, 2), (64, 16), (3, 17), (5, 1), (2, 99), (1, 989), (19, 33)])
@pytest.mark.parametrize(("scale", "baseline"), list(product(SCALES, BASELINES)))
def test_matches_the_formula(
    op: Backend, dtype: torch.dtype, shape: tuple[int, int], scale: str, baseline: str
) -> None:
    r, truth, peer = solved(shape, dtype, scale, baseline)
    assert_close(op(r, scale=scale, baseline=baseline), peer, truth)


@backends
def test_is_trls_formula(op: Backend) -> None:
    r = torch.randn(64, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    trl = (r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True) + 1e-4)
    torch.testing.assert_close(op(r), trl, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(
        op(r.flatten(), group_size=16), trl.flatten(), rtol=1e-13, atol=1e-13
    )
    batch = (r - r.mean(1, keepdim=True)) / (r.std() + 1e-4)
    torch.testing.assert_close(op(r, scale="batch"), batch, rtol=1e-13, atol=1e-13)
    biased = (r - r.mean(1, keepdim=True)) / (r.std(1, correction=0, keepdim=True) + 1e-8)
    torch.testing.assert_close(op(r, unbiased=False, eps=1e-8), biased, rtol=1e-13, atol=1e-13)


@backends
def test_small_case_by_hand(op: Backend) -> None:
    r = torch.tensor([[1.0, 3.0], [0.0, 0.0]])
    half = 1 / 2**0.5
    assert op(r, eps=0.0).flatten().tolist() == pytest.approx([-half, half, 0, 0])
    assert op(r, scale="none").tolist() == [[-1, 1], [0, 0]]
    assert op(r, scale="none", baseline="leave_one_out").tolist() == [[-2, 2], [0, 0]]
    assert op(r, scale="none", clip=0.5).tolist() == [[-0.5, 0.5], [0, 0]]
    assert op(r, eps=0.0, unbiased=False).tolist() == [[-1, 1], [0, 0]]


@backends
@dtypes
@pytest.mark.parametrize("scale", SCALES)
def test_group_without_spread_is_exactly_zero(op: Backend, dtype: torch.dtype, scale: str) -> None:
    r = torch.full((4, 7), 0.1, dtype=dtype)
    r[1] = 1e4 + 1 / 3
    r[3] = torch.linspace(0, 1, 7)
    r[2, 1:] = torch.nan  # a single member that counts
    for baseline in BASELINES:
        out = op(r, scale=scale, baseline=baseline, eps=0.0)
        assert out[:3].eq(0).all()
        assert not out[:3].signbit().any()
        assert out[3].ne(0).any()


@backends
def test_common_offset_costs_no_digits(op: Backend) -> None:
    r = torch.tensor([[1.0, 2.0, 4.0]], dtype=torch.float64)
    torch.testing.assert_close(op(r + 2.0**40), op(r), rtol=1e-3, atol=0)
    if not op.is_reference:  # it keeps the rounding error of its mean
        assert op(r + 2.0**40).equal(op(r))


# --- Groups, masks, strides ----------------------------------------------------------------------


@settings(max_examples=examples(150), deadline=None, derandomize=not FULL)
@given(
    data=st.data(),
    seed=st.integers(0, 2**20),
    dtype=st.sampled_from(DTYPES),
    strides=st.tuples(*[st.sampled_from(["contiguous", "step", "transposed", "column"])] * 3),
    layout=st.sampled_from(["matrix", "size", "ids"]),
)
def test_any_layout(
    data: st.DataObject,
    seed: int,
    dtype: torch.dtype,
    strides: tuple[str, str, str],
    layout: str,
) -> None:
    groups, members = data.draw(st.integers(0, 9)), data.draw(st.integers(1, 40))
    r = sample(groups, members, dtype, seed, nan=data.draw(st.sampled_from([0.0, 0.2, 0.9])))
    g = torch.Generator().manual_seed(seed)
    ids = rows_to_groups(groups, members)
    options: dict = {
        "scale": data.draw(st.sampled_from(SCALES)),
        "baseline": data.draw(st.sampled_from(BASELINES)),
        "eps": data.draw(st.sampled_from([1e-4, 1e-8, 0.5])),
        "clip": data.draw(st.sampled_from([None, 0.7, 5.0])),
        "unbiased": data.draw(st.booleans()),
    }
    mask = torch.rand(r.shape, generator=g) < 0.7 if data.draw(st.booleans()) else None
    how: dict = {}
    if layout != "matrix":
        r, ids, mask = r.flatten(), ids.flatten(), None if mask is None else mask.flatten()
        how = {"group_size": members}
    if layout == "ids":
        labels = torch.randint(0, data.draw(st.sampled_from([3, 60, 2**62])), (9,), generator=g)
        ids = labels[ids]  # groups whose labels collide become one
        if data.draw(st.booleans()):
            ids = ids[torch.randperm(len(ids), generator=g)]
        how = {"group_ids": restride(ids, strides[2])}
    truth = exact(r, ids, mask, **options)
    mask = None if mask is None else restride(mask, strides[1])
    peer = group_advantage_reference(restride(r, strides[0]), **how, mask=mask, **options)
    got = group_advantage(restride(r, strides[0]), **how, mask=mask, **options)
    assert_close(peer, peer, truth)
    assert_close(got, peer, truth)
    assert got.is_contiguous()
    assert same(CHECKED(restride(r, strides[0]), **how, mask=mask, **options), got)
    lost = ~r.isfinite() if mask is None else ~(r.isfinite() & mask)
    assert got[lost].eq(0).all()


@settings(max_examples=examples(150), deadline=None, derandomize=not FULL)
@given(
    st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=20),
    st.sampled_from([0.0, 1e-4]),
    st.sampled_from(BASELINES),
)
@example([0.0, 0.0, 2.0**-149], 1e-4, "mean")
def test_any_values(values: list[float], eps: float, baseline: str) -> None:
    """Two roundings off at most: of float32, whose least step is 2^-149."""
    r = torch.tensor([values], dtype=torch.float32)
    truth = exact(r, torch.zeros(r.shape, dtype=torch.int64), eps=eps, baseline=baseline)
    got = group_advantage(r, eps=eps, baseline=baseline)
    step = max(np.finfo(np.float32).eps * np.abs(truth).max(), np.longdouble(2) ** -149)
    assert np.abs(got.numpy() - truth).max() <= step
    assert same(CHECKED(r, eps=eps, baseline=baseline), got)


@backends
def test_expanded_and_empty(op: Backend) -> None:
    one = torch.tensor([1.0, 2.0, 4.0])
    assert op(one.expand(5, 3)).equal(op(one[None]).expand(5, 3))
    assert op(one.expand(5, 3), mask=torch.tensor(True).expand(5, 3)).equal(op(one.expand(5, 3)))
    for shape in [(0, 4), (4, 0), (0, 0)]:
        assert op(torch.zeros(shape)).shape == shape
    assert op(torch.zeros(0), group_size=3).shape == (0,)
    assert op(torch.zeros(0), torch.zeros(0, dtype=torch.int64)).shape == (0,)
    lost = op(one.expand(2, 3), mask=torch.zeros(2, 3, dtype=torch.bool))
    assert lost.eq(0).all()
    assert not op(one[None].requires_grad_()).requires_grad
    one.requires_grad_(False)


def test_16_bit_formats_are_read_and_written_like_pytorch() -> None:
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.bfloat16, torch.float16):
        x = bits.view(dtype)
        x = x[x.isfinite() & x.ne(0)]
        pairs = torch.stack([x, -x], 1)  # mean 0: the advantage is the reward
        assert group_advantage(pairs, scale="none").equal(pairs)
        with emulated("plain"):
            assert group_advantage(pairs[::16], scale="none").equal(pairs[::16])
        for factor in (1.0, 1e-5, 3e-8):  # down to subnormals
            r = (torch.randn(512, 6, generator=torch.Generator().manual_seed(2)) * factor).to(dtype)
            wide = group_advantage(r.double(), scale="none").float()
            assert group_advantage(r, scale="none").equal(wide.to(dtype))
        assert group_advantage(torch.tensor([[-6e4, 6e4]]).half(), scale="none", clip=1e9).equal(
            torch.tensor([[-6e4, 6e4]]).half()
        )


# --- The same bits -------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("scale", ["group", "none"])
def test_bits_do_not_depend_on_the_rest_of_the_batch(dtype: torch.dtype, scale: str) -> None:
    r = sample(40, 37, dtype, seed=3, nan=0.1)
    whole = group_advantage(r, scale=scale)
    ids = torch.randperm(40)[:, None].expand(40, 37)
    assert group_advantage(r.flatten(), ids.flatten() * 10**12, scale=scale).equal(whole.flatten())
    assert group_advantage(r.flatten(), group_size=37, scale=scale).equal(whole.flatten())
    mixed = torch.argsort(torch.rand(40 * 37), stable=True)
    mixed = mixed[torch.argsort(mixed % 37, stable=True)]  # groups interleave, rows keep order
    out = group_advantage(r.flatten()[mixed], ids.flatten()[mixed], scale=scale)
    assert out.equal(whole.flatten()[mixed])
    for g in range(40):
        alone = r[g][r[g].isfinite()]  # rows that take no part may as well not be there
        assert group_advantage(alone[None], scale=scale)[0].equal(whole[g][r[g].isfinite()])


@dtypes
@pytest.mark.parametrize("shape", [(9, 16), (5, 1), (2, 99), (8, 128), (3, 515)])
@pytest.mark.parametrize(("scale", "baseline"), list(product(SCALES, BASELINES)))
def test_the_cuda_kernel_gives_the_bits_of_the_cpu(
    dtype: torch.dtype, shape: tuple[int, int], scale: str, baseline: str
) -> None:
    r = sample(*shape, dtype, seed=shape[1], nan=0.05)
    ids = torch.randint(0, 7, (r.numel(),), generator=torch.Generator().manual_seed(1))
    for args in (
        (r,),
        (r.flatten(), ids),
        (r.t().contiguous().t(),),
    ):  # tiles, runs of ids, strides
        want = group_advantage(*args, scale=scale, baseline=baseline)
        assert same(CHECKED(*args, scale=scale, baseline=baseline), want)


def test_bits_do_not_depend_on_instruction_set_or_threads() -> None:
    assert_same_bits_everywhere("group_advantage_cases.py")


def test_reference_can_be_forced() -> None:
    code = (
        "import torch; from rlir import ops, _library; import sys;"
        "r = torch.randn(5, 9); a = ops.group_advantage(r);"
        "assert a.equal(ops.group_advantage_reference(r)) and _library.PATH is None;"
        "assert not hasattr(torch.ops.rlir, 'group_advantage')"
    )
    subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "RLIR_FORCE_REFERENCE": "1"}, check=True
    )


# --- Registration --------------------------------------------------------------------------------


def test_opcheck() -> None:
    r = sample(4, 6, torch.float32)
    ids = torch.randint(0, 3, (24,))
    mask = torch.rand(4, 6) < 0.5
    calls: list[tuple[tuple, dict]] = [
        ((r,), {}),
        ((r.t().contiguous().t(), None, mask), {"scale": "batch", "clip": 1.0}),
        ((r.flatten(), ids), {"baseline": "leave_one_out", "unbiased": False}),
        ((r.flatten()[::2],), {"group_size": 4}),
        ((r[:0],), {}),
        ((r.half(),), {"scale": "none"}),
    ]
    for args, options in calls:
        torch.library.opcheck(RAW, args, options)


def test_compiles_once_for_all_sizes() -> None:
    def step(r: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        return group_advantage(r * 2, ids, mask=mask, clip=2.0) + 1

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=True)
    for n, stance in ((6, "default"), (11, "fail_on_recompile"), (64, "fail_on_recompile")):
        r, ids, mask = torch.randn(n), torch.randint(0, 4, (n,)), torch.rand(n) < 0.8
        with torch.compiler.set_stance(stance):
            assert compiled(r, ids, mask).equal(step(r, ids, mask))


def test_compiles_once_for_all_group_sizes() -> None:
    def step(r: Tensor, size: int) -> Tensor:
        return group_advantage(r, group_size=size)

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=True)
    for groups, size, stance in ((3, 4, "default"), (5, 6, "fail_on_recompile")):
        r = torch.randn(groups * size)
        with torch.compiler.set_stance(stance):
            assert compiled(r, size).equal(step(r, size))


# --- Errors --------------------------------------------------------------------------------------

R, IDS = torch.zeros(6), torch.zeros(6, dtype=torch.int64)
HOSTILE: list[tuple[tuple, dict, str]] = [
    ((R.long(), IDS), {}, "rewards must be float64, float32, bfloat16 or float16, got torch.int64"),
    (
        (torch.zeros(1, 2, 3),),
        {},
        "rewards must be [groups, members] or [rows], got shape (1, 2, 3)",
    ),
    ((R,), {}, "rewards [rows] must come with group_ids or group_size, got neither"),
    (
        (R, IDS),
        {"group_size": 3},
        "rewards [rows] must come with group_ids or group_size, got both",
    ),
    (
        (R[None],),
        {"group_size": 6},
        "rewards [groups, members] must come without group_ids and group_size, got group_size",
    ),
    ((R, IDS.int()), {}, "group_ids must be torch.int64, got torch.int32"),
    ((R, IDS[:5]), {}, "group_ids must have the shape of rewards, (6,), got (5,)"),
    ((R, IDS.to("meta")), {}, "group_ids must be on cpu, got meta"),
    ((R, IDS - 3), {}, "group_ids must be >= 0, got -3"),
    ((R,), {"group_size": 0}, "group_size must be >= 1, got 0"),
    ((R,), {"group_size": 4}, "group_size must divide the 6 rewards, got 4"),
    ((R, IDS), {"mask": R}, "mask must be torch.bool, got torch.float32"),
    ((R[None],), {"mask": R > 0}, "mask must have the shape of rewards, (1, 6), got (6,)"),
    ((R[None],), {"scale": "std"}, "scale must be 'group', 'batch' or 'none', got 'std'"),
    ((R[None],), {"baseline": "max"}, "baseline must be 'mean' or 'leave_one_out', got 'max'"),
    ((R[None],), {"eps": -1.0}, "eps must be finite and >= 0, got -1.0"),
    ((R[None],), {"eps": float("nan")}, "eps must be finite and >= 0, got nan"),
    ((R[None],), {"clip": 0.0}, "clip must be > 0 or None, got 0.0"),
    ((R[None],), {"clip": float("nan")}, "clip must be > 0 or None, got nan"),
]


@backends
@pytest.mark.parametrize(("args", "options", "message"), HOSTILE)
def test_hostile_inputs(op: Backend, args: tuple, options: dict, message: str) -> None:
    if op.name == "cuda" and ("meta" in message or "-3" in message):
        pytest.skip("the message names the device, or comes at the next synchronisation")
    if op.is_emulated and "-3" in message:
        pytest.skip("a kernel cannot say which; see the next test")
    with pytest.raises(InputError) as caught:
        op(*args, **options)
    assert str(caught.value) == f"group_advantage: {message}"


def test_the_cuda_kernel_asserts_that_ids_are_not_negative() -> None:
    ids = torch.tensor([2, -1, 2, 0, -1, 0])
    with pytest.raises(
        InputError, match="device assertion: group_advantage: group_ids must be >= 0"
    ):
        CHECKED(torch.arange(6.0), ids)


@pytest.mark.parametrize(("args", "options", "message"), HOSTILE)
def test_raw_operator_is_safe_from_hostile_inputs(args: tuple, options: dict, message: str) -> None:
    if "meta" in message:
        pytest.skip("meta tensors take the fake")
    with pytest.raises(RuntimeError) as caught:
        RAW(*args, **options)
    assert str(caught.value).startswith(f"group_advantage: {message.split(' must ')[0]} must ")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [8, 16, 32])
@pytest.mark.parametrize(
    "options", [{}, {"baseline": "leave_one_out"}, {"scale": "none"}, {"scale": "batch", "clip": 1}]
)
def test_rows_side_by_side_have_the_bits_of_rows_apart(
    dtype: torch.dtype, size: int, options: dict
) -> None:
    """Of the first, groups of 16 and 32 stay in registers."""
    generator = torch.Generator().manual_seed(size)
    rewards = torch.randn(40, size, generator=generator, dtype=torch.float64).to(dtype)
    rewards[0], rewards[1], rewards[2, 3], rewards[3, 1] = 0.3, 0.0, math.nan, math.inf
    rewards[4] *= 1e-30
    apart = torch.stack([rewards, rewards], -1)[..., 0]
    assert apart.stride(-1) == 2
    assert same(group_advantage(rewards, **options), group_advantage(apart, **options))
