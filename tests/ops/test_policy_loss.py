"""policy_loss: the reference, CPU and CUDA kernels against the formula in extended precision.

This file is longer than most: one op with many options, and every one of its promises.
"""

import os
import subprocess
import sys
from collections import defaultdict
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from backends import Backend, backends_of, instruction_sets
from hypothesis import given, settings
from hypothesis import strategies as st
from isas import assert_same_bits_everywhere
from policy_loss_cases import (
    DTYPES,
    ESTIMATORS,
    FIELDS,
    LEVELS,
    LOSS_TYPES,
    apart,
    call,
    exact,
    sample,
)
from testkit import FULL, examples, same
from torch import Tensor

from rlir.errors import InputError
from rlir.ops import policy_loss, policy_loss_reference

CPU = Backend(f"cpu-{instruction_sets()[-1]}", policy_loss)
CHECKED = Backend("emu-checked", policy_loss)
RAW = torch.ops.rlir.policy_loss.default

backends = backends_of(policy_loss, policy_loss_reference)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
kinds = pytest.mark.parametrize(("loss_type", "level"), list(product(LOSS_TYPES, LEVELS)))


def assert_close(got: Tensor, peer: Tensor, truth: np.ndarray, scale: float | None = None) -> None:
    """At most twice the error of the reference in the same dtype, plus one ulp of the largest."""
    assert got.dtype == peer.dtype
    assert got.shape == peer.shape == truth.shape
    if not got.numel():
        return
    error = np.abs(got.double().numpy() - truth).max()
    allowed = 2 * np.abs(peer.double().numpy() - truth).max()
    largest = max(np.abs(truth).max(), scale or 0.0, torch.finfo(got.dtype).tiny)
    assert error <= allowed + torch.finfo(got.dtype).eps * largest, (error, allowed, largest)


def compare(op: Backend, x: dict[str, Tensor] | list[dict[str, Tensor]], **options: Any) -> None:
    """Loss, gradient and every statistic against the formula; those of several draws of one shape
    together, since the error of a single number is luck.
    """
    found: dict[str, list[tuple[Tensor, Tensor, Any, float]]] = defaultdict(list)
    for drawn in x if isinstance(x, list) else [x]:
        mask = apart(drawn, 0.2, options.get("clip_high", 0.2), options.get("delta"))
        drawn = {**drawn, "mask": mask}
        loss, gradient, seen = exact(drawn, **options)
        got, peer = call(op, drawn, **options), call(policy_loss_reference, drawn, **options)
        # The loss is a sum of both signs: its error is one of the terms, not of what is left.
        size = float(np.abs(gradient).sum()) + abs(float(loss))
        found["loss"].append((got[0], peer[0], loss, size))
        found["gradient"].append((got[1], peer[1], gradient, 0.0))
        assert got[2].keys() == peer[2].keys()
        for name, value in got[2].items():
            found[name].append((value, peer[2][name], seen[name], 1.0))
    for cases in found.values():
        ours, theirs, true, sizes = zip(*cases, strict=True)
        assert_close(torch.stack(ours), torch.stack(theirs), np.stack(true), max(sizes))


# --- Values --------------------------------------------------------------------------------------


@backends
@dtypes
@kinds
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (2, 333)])
def test_matches_the_formula(
    op: Backend, dtype: torch.dtype, loss_type: str, level: str, shape: tuple[int, int]
) -> None:
    for k, estimator in enumerate(ESTIMATORS):
        draws = 32 if shape == (1, 1) else 1
        compare(
            op,
            [sample(*shape, dtype, seed=k + 100 * draw) for draw in range(draws)],
            loss_type=loss_type,
            importance_level=level,
            clip_high=0.3,
            delta=(None, 1.5, 4.0)[k],
            kl_weight=0.1,
            kl_estimator=estimator,
            kl_importance=k > 0,
            truncated_importance=(1.1, 2.0, np.inf)[k],
            normalizer=(None, 1000.0, 7.5)[k],
            max_length=(None, 400, 1)[k],
        )


@backends
@kinds
def test_plain_calls(op: Backend, loss_type: str, level: str) -> None:
    """Without reference, rollout, mask and options; advantages one a row."""
    x = sample(4, 19, torch.float32)
    x = {k: x[k] for k in ("logprob", "old_logprob", "advantages")}
    x["advantages"] = x["advantages"][:, :1].expand(4, 19)
    options = {"loss_type": loss_type, "importance_level": level}
    loss, gradient, _ = exact(x, **options)
    for advantages in (x["advantages"], x["advantages"][:, :1], x["advantages"][:, 0]):
        got = call(op, {**x, "advantages": advantages}, **options)
        assert float(got[0]) == pytest.approx(float(loss), rel=1e-5, abs=1e-7)
        np.testing.assert_allclose(got[1].numpy(), gradient.astype(float), rtol=1e-4, atol=1e-7)
        assert not {"kl", "importance", "truncated"} & got[2].keys()


@backends
def test_small_case_by_hand(op: Backend) -> None:
    old = torch.zeros(1, 4, dtype=torch.float64)
    p = torch.tensor([[1.5, 0.5, 1.5, 5.0]], dtype=torch.float64).log()
    a = torch.tensor([[2.0, -1.0, -1.0, -1.0]], dtype=torch.float64)
    x = {"logprob": p, "old_logprob": old, "advantages": a}
    loss, gradient, seen = call(op, x, delta=3.0)
    # clipped high; clipped low; passes; stopped by delta
    assert float(loss) == pytest.approx((-1.2 * 2 + 0.8 + 1.5 + 3.0) / 4)
    assert gradient[0].tolist() == pytest.approx([0, 0, 1.5 / 4, 0])
    assert {k: float(v) for k, v in seen.items()} == pytest.approx(
        {
            "tokens": 4,
            "old_kl": -float(p.mean()),
            "ratio": 8.5 / 4,
            "ratio_min": 0.5,
            "ratio_max": 5.0,
            "ess": 8.5**2 / 4 / (2 * 1.5**2 + 0.5**2 + 25),
            "clipped_low": 0.25,
            "clipped_high": 0.25,
            "clipped_delta": 0.25,
            "outside": 1.0,
        }
    )


@backends
@dtypes
def test_on_policy_the_ratio_is_exactly_one(op: Backend, dtype: torch.dtype) -> None:
    x = sample(3, 50, dtype)
    x.update(old_logprob=x["logprob"], ref_logprob=x["logprob"])
    for level in LEVELS:
        _, _, seen = call(op, x, importance_level=level, truncated_importance=9.0, kl_weight=0.1)
        for name in ("ratio", "ratio_min", "ratio_max", "ess"):
            assert seen[name] == 1
        for name in ("kl", "old_kl", "outside"):
            assert seen[name] == 0


@backends
def test_a_small_divergence_keeps_its_digits(op: Backend) -> None:
    p = torch.zeros(1, 8)
    q = torch.full((1, 8), 1e-5)
    _, seen = op(p, p, torch.zeros(1), ref_logprob=q)
    assert float(seen.kl) == pytest.approx(5e-11, rel=1e-2 if op.is_reference else 1e-5)


# --- What takes no part --------------------------------------------------------------------------


@backends
@kinds
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_masked_may_be_anything(
    op: Backend, loss_type: str, level: str, value: float
) -> None:
    x = sample(5, 40, torch.float32)
    x["mask"][2] = False
    options = {"kl_weight": 0.1, "truncated_importance": 1.2, "loss_type": loss_type}
    options["importance_level"] = level
    wild = {k: v if k == "mask" else v.where(x["mask"], value) for k, v in x.items()}
    clean, dirty = call(op, x, **options), call(op, wild, **options)
    assert dirty[0].equal(clean[0])
    assert dirty[1].equal(clean[1])
    assert dirty[1][~x["mask"]].eq(0).all()
    for name in clean[2]:
        assert dirty[2][name].equal(clean[2][name]), name


@backends
@kinds
@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0), (3, 5)])
def test_nothing_that_counts(
    op: Backend, loss_type: str, level: str, shape: tuple[int, int]
) -> None:
    x = sample(*shape, torch.float32)
    x["mask"] = torch.zeros(shape, dtype=torch.bool)
    loss, gradient, seen = call(
        op,
        x,
        loss_type=loss_type,
        importance_level=level,
        kl_weight=0.1,
        truncated_importance=1.2,
        normalizer=3.0,
    )
    assert loss == 0
    assert gradient.shape == shape
    assert gradient.eq(0).all()
    assert {k: float(v) for k, v in seen.items()} == dict.fromkeys(FIELDS, 0.0)


@backends
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_no_advantage_no_gain_whatever_the_ratio(op: Backend, loss_type: str) -> None:
    p = torch.tensor([[200.0, -1.0], [-300.0, -1.0]])
    x = {"logprob": p, "old_logprob": torch.zeros(2, 2), "advantages": torch.zeros(2)}
    loss, gradient, seen = call(op, x, loss_type=loss_type)
    assert loss == 0
    assert gradient.eq(0).all()
    assert seen["ratio_max"] == torch.inf


@backends
@kinds
def test_nan_is_not_hidden(op: Backend, loss_type: str, level: str) -> None:
    x = sample(3, 20, torch.float32)
    x["mask"][:] = True
    x["logprob"][1, 4] = torch.nan
    loss, gradient, seen = call(
        op, x, loss_type=loss_type, importance_level=level, truncated_importance=2.0
    )
    assert loss.isnan()
    assert gradient[0].isfinite().all()
    if not op.is_reference:
        assert gradient[1, 4].isnan() or loss_type == "cispo"
    assert seen["ratio"].isnan()
    assert seen["ratio_min"].isnan()
    assert seen["ratio_max"].isnan()


@backends
def test_a_rollout_without_logprob_is_not_corrected(op: Backend) -> None:
    x = sample(2, 9)
    x["rollout_logprob"][1, 3] = torch.nan
    as_old = {
        **x,
        "rollout_logprob": x["rollout_logprob"].where(
            ~x["rollout_logprob"].isnan(), x["old_logprob"]
        ),
    }
    got, expected = (call(op, y, truncated_importance=1.1) for y in (x, as_old))
    assert got[0].equal(expected[0])
    assert got[1].equal(expected[1])


@backends
def test_a_reference_that_finds_a_token_far_likelier_does_not_overflow(op: Backend) -> None:
    p = torch.full((1, 1), -200.0)
    x = {"logprob": p, "old_logprob": p, "advantages": torch.ones(1), "ref_logprob": p + 200}
    loss, gradient, _ = call(op, x, kl_weight=0.1)
    assert loss.isfinite()
    assert gradient.isfinite().all()


# --- Layouts -------------------------------------------------------------------------------------


def restride(x: Tensor, kind: str) -> Tensor:
    if kind == "step":
        wide = torch.zeros(x.shape[0], x.shape[1] * 3 + 1, dtype=x.dtype)[:, 1::3]
        return wide.copy_(x)
    if kind == "transposed":
        return x.t().contiguous().t()
    if kind == "column":
        return torch.stack([x, x, x], dim=-1)[..., 1]
    return x.contiguous()


LAYOUTS = ("contiguous", "step", "transposed", "column")


@pytest.mark.parametrize("op", [CPU, CHECKED], ids=lambda op: op.name)
@settings(max_examples=examples(60), deadline=None, derandomize=not FULL)
@given(data=st.data())
def test_any_layout_and_mixture_of_dtypes(op: Backend, data: st.DataObject) -> None:
    b, t = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 300))
    x = sample(b, t, torch.bfloat16, seed=data.draw(st.integers(0, 999)))  # exact in all of them
    x["mask"] = apart(x, 0.2, 0.2, None)
    if data.draw(st.booleans()):
        x["advantages"] = x["advantages"][:, :1].expand(b, t)
    options = {
        "loss_type": data.draw(st.sampled_from(LOSS_TYPES)),
        "importance_level": data.draw(st.sampled_from(LEVELS)),
        "kl_weight": 0.1,
        "truncated_importance": 1.3,
    }
    expected = call(
        policy_loss_reference, {k: v.float() if k != "mask" else v for k, v in x.items()}, **options
    )
    moved = {}
    for name, value in x.items():
        dtype = data.draw(st.sampled_from(DTYPES[1:3])) if name != "mask" else torch.bool
        keep = name == "advantages" and value.stride(1) == 0
        moved[name] = (
            value.to(dtype)
            if keep
            else restride(value.to(dtype), data.draw(st.sampled_from(LAYOUTS)))
        )
    loss, gradient, _ = call(op, moved, **options)
    torch.testing.assert_close(loss, expected[0], rtol=1e-4, atol=1e-5)
    assert gradient.dtype == moved["logprob"].dtype
    torch.testing.assert_close(gradient.float(), expected[1], rtol=1e-2, atol=1e-5)


@backends
def test_constants_get_no_gradient_and_the_gradient_of_the_loss_may_be_anything(
    op: Backend,
) -> None:
    x = {k: v.requires_grad_() if k != "mask" else v for k, v in sample(3, 7).items()}
    leaf, old, a = x.pop("logprob"), x.pop("old_logprob"), x.pop("advantages")
    options = {"kl_weight": 0.1, "truncated_importance": 1.1, **x}
    with op.active():
        loss, seen = op(leaf, old, a, **options)
        assert not any(getattr(seen, name).requires_grad for name in FIELDS)
        (loss.expand(5) * torch.arange(5)).sum().backward()  # a broadcast gradient, 10 in sum
        once = leaf.grad.clone()
        leaf.grad = None
        op(leaf, old, a, **options)[0].backward()
    torch.testing.assert_close(once, leaf.grad * 10)
    assert all(v.grad is None for v in (old, a, x["ref_logprob"], x["rollout_logprob"]))
    with torch.no_grad():
        assert op(leaf, old, a, **options)[0].equal(loss.detach())


@backends_of(policy_loss, policy_loss_reference, only=lambda op: op.name != "emu-checked")
@kinds
def test_gradcheck(op: Backend, loss_type: str, level: str) -> None:
    if loss_type == "cispo":
        pytest.skip("its gradient is not that of its value: the ratio is a constant")
    x = sample(3, 6, seed=4)
    x["mask"] = apart(x, 0.2, 0.2, 1.5)
    leaf, old, a = x.pop("logprob").requires_grad_(), x.pop("old_logprob"), x.pop("advantages")
    for estimator in ESTIMATORS:
        options = {"kl_estimator": estimator, "kl_weight": 0.1, "truncated_importance": 1.1}
        options["kl_importance"] = estimator != "k1"
        options.update(x, loss_type=loss_type, importance_level=level, delta=1.5)
        with op.active():
            assert torch.autograd.gradcheck(lambda p, o=options: op(p, old, a, **o)[0], (leaf,))


@backends
def test_a_normalizer_may_be_a_tensor(op: Backend) -> None:
    x = sample(3, 7, torch.float32)
    expected = call(op, x, loss_type="dapo", kl_weight=0.1, truncated_importance=2, normalizer=12.0)
    for n in (torch.tensor(12), torch.tensor([12.0]), torch.tensor(12.0, dtype=torch.float64)):
        got = call(op, x, loss_type="dapo", kl_weight=0.1, truncated_importance=2, normalizer=n)
        assert got[0].equal(expected[0])
        assert got[1].equal(expected[1])


# --- The same bits -------------------------------------------------------------------------------


def cuda_backends(test: Any) -> Any:
    only = backends_of(
        policy_loss, policy_loss_reference, only=lambda op: op.is_emulated or op.name == "cuda"
    )
    return only(test)


@cuda_backends
@dtypes
@kinds
@pytest.mark.parametrize("shape", [(3, 20), (2, 333), (1, 4613)])
def test_the_cuda_kernels_give_the_bits_of_the_cpu(
    op: Backend, dtype: torch.dtype, loss_type: str, level: str, shape: tuple[int, int]
) -> None:
    """Rows that can be read four tokens at a time and rows that cannot; two rounds of blocks."""
    x = sample(*shape, dtype)
    if shape[0] == 3:
        x["mask"][1] = False
    options = {"loss_type": loss_type, "importance_level": level, "delta": 1.5, "kl_weight": 0.1}
    options.update(truncated_importance=1.1, kl_importance=shape[1] == 333)
    assert same(call(op, x, **options), call(CPU, x, **options))
    bare = {k: x[k] for k in ("logprob", "old_logprob")} | {"advantages": x["advantages"][:, 0]}
    options = {"loss_type": loss_type, "importance_level": level, "normalizer": 7.0}
    assert same(call(op, bare, **options), call(CPU, bare, **options))


@cuda_backends
def test_the_cuda_kernels_add_many_rows_in_order(op: Backend) -> None:
    x = sample(150, 4, torch.float32)
    for loss_type in LOSS_TYPES:
        got, want = (
            call(o, x, loss_type=loss_type, kl_weight=0.1, truncated_importance=2.0)
            for o in (op, CPU)
        )
        assert same(got, want)


def test_a_rows_gradient_does_not_depend_on_the_rest_of_the_batch() -> None:
    x = sample(9, 777, torch.float32)
    options = {"loss_type": "dapo", "normalizer": 100.0, "kl_weight": 0.1}
    for level in LEVELS:
        options.update(importance_level=level, truncated_importance=1.1)
        whole = call(policy_loss, x, **options)[1]
        for i in range(9):
            alone = call(policy_loss, {k: v[i : i + 1] for k, v in x.items()}, **options)[1]
            assert alone[0].equal(whole[i])


def test_bits_do_not_depend_on_instruction_set_or_threads() -> None:
    assert_same_bits_everywhere("policy_loss_cases.py")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_exponential_is_right_to_the_last_digit(dtype: torch.dtype) -> None:
    """By way of the ratio of single tokens: all magnitudes, subnormal results, the ends."""
    ends = {torch.float32: (-104.0, 88.7), torch.float64: (-745.0, 709.7)}[dtype]
    x = torch.linspace(*ends, 4001, dtype=torch.float64).to(dtype)
    small = torch.logspace(-12, 0, 500, dtype=torch.float64).to(dtype)
    x = torch.cat([x, small, -small, torch.tensor([0.0, -torch.inf], dtype=dtype)])
    one = torch.ones(1, dtype=dtype)
    zero = torch.zeros(1, 1, dtype=dtype)
    got = torch.stack([policy_loss(v.view(1, 1), zero, one)[1].ratio for v in x]).double().numpy()
    truth = np.exp(x.double().numpy().astype(np.longdouble))
    info = torch.finfo(dtype)
    ulp = np.maximum(np.abs(truth) * info.eps, info.tiny * info.eps)
    assert (np.abs(got - truth) / ulp).max() < 1
    over = torch.tensor([[89.0 if dtype == torch.float32 else 710.0, torch.inf]], dtype=dtype)
    assert policy_loss(over, torch.zeros_like(over), one)[1].ratio_min == torch.inf


def test_reference_can_be_forced() -> None:
    code = (
        "import torch; from rlir import ops, _library;"
        "x = torch.randn(3, 5, 9); a = ops.policy_loss(*x)[0];"
        "assert a.equal(ops.policy_loss_reference(*x)[0]) and _library.PATH is None;"
        "assert not hasattr(torch.ops.rlir, 'policy_loss')"
    )
    subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "RLIR_FORCE_REFERENCE": "1"}, check=True
    )


# --- Registration --------------------------------------------------------------------------------


def test_opcheck() -> None:
    x = sample(4, 6, torch.float32)
    leaf = x["logprob"].clone().requires_grad_()
    wide = sample(3, 5)
    calls: list[tuple[tuple, dict]] = [
        ((leaf, x["old_logprob"], x["advantages"][:, 0]), {}),
        (
            (leaf, x["old_logprob"], x["advantages"], x["ref_logprob"], x["mask"]),
            {"kl_weight": 0.1, "importance_level": "sequence", "loss_type": "bnpo"},
        ),
        (
            (wide["logprob"], *(wide[k] for k in ("old_logprob", "advantages", "ref_logprob"))),
            {"loss_type": "dr_grpo", "max_length": 9},
        ),
        (
            (leaf.t(), x["old_logprob"].t(), x["advantages"].t(), None, None),
            {"loss_type": "cispo", "clip_high": 5.0, "divisor": 3.0},
        ),
        ((leaf[:0], x["old_logprob"][:0], x["advantages"][:0]), {}),
        (
            (leaf, x["old_logprob"], x["advantages"], None, None, x["rollout_logprob"]),
            {"truncated_importance": 2.0, "loss_type": "dapo"},
        ),
    ]
    for args, options in calls:
        torch.library.opcheck(RAW, args, options)
    _, _, scales = RAW(*calls[0][0])
    backward = torch.ops.rlir.policy_loss_backward.default
    torch.library.opcheck(
        backward, (torch.tensor(2.0), scales, leaf.detach(), *calls[0][0][1:]), {}
    )


def test_compiles_once_for_all_sizes() -> None:
    def step(p: Tensor, old: Tensor, a: Tensor, ref: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        loss, seen = policy_loss(p * 2, old, a, ref_logprob=ref, mask=mask, kl_weight=0.1)
        return loss + 1, seen.ratio

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=True)
    for b, t, stance in ((3, 6, "default"), (5, 11, "fail_on_recompile")):
        x = sample(b, t, torch.float32)
        args = [x[k] for k in ("old_logprob", "advantages", "ref_logprob", "mask")]
        p, q = (x["logprob"].clone().requires_grad_() for _ in range(2))
        with torch.compiler.set_stance(stance):
            got = compiled(p, *args)
            got[0].backward()
        expected = step(q, *args)
        expected[0].backward()
        assert got[0].equal(expected[0])
        assert got[1].equal(expected[1])
        assert p.grad.equal(q.grad)


# --- Errors --------------------------------------------------------------------------------------

P = torch.zeros(2, 3)
A = torch.zeros(2)
FLOATS = "must be float64, float32, bfloat16 or float16"
HOSTILE: list[tuple[tuple, dict, str]] = [
    ((P[0], P[0], A), {}, "logprob must be [B, T], got shape (3,)"),
    ((P.long(), P, A), {}, f"logprob {FLOATS}, got torch.int64"),
    ((P, P.bool(), A), {}, f"old_logprob {FLOATS}, got torch.bool"),
    ((P, P[:, :2], A), {}, "old_logprob must have the shape of logprob, (2, 3), got (2, 2)"),
    ((P, P, torch.zeros(3)), {}, "advantages must have the shape (2,) or (2, 3), got (3,)"),
    ((P, P, torch.zeros(1, 3)), {}, "advantages must have the shape (2,) or (2, 3), got (1, 3)"),
    ((P, P.to("meta"), A), {}, "old_logprob must be on cpu, got meta"),
    ((P, P, A), {"mask": P}, "mask must be torch.bool, got torch.float32"),
    ((P, P, A), {"mask": A > 0}, "mask must have the shape of logprob, (2, 3), got (2,)"),
    (
        (P, P, A),
        {"loss_type": "sapo"},
        "loss_type must be 'grpo', 'dr_grpo', 'bnpo', 'dapo' or 'cispo', got 'sapo'",
    ),
    (
        (P, P, A),
        {"importance_level": "row"},
        "importance_level must be 'token' or 'sequence', got 'row'",
    ),
    ((P, P, A), {"kl_estimator": "k4"}, "kl_estimator must be 'k1', 'k2' or 'k3', got 'k4'"),
    ((P, P, A), {"clip_low": 1.5}, "clip_low must be between 0 and 1, got 1.5"),
    ((P, P, A), {"clip_low": float("nan")}, "clip_low must be between 0 and 1, got nan"),
    ((P, P, A), {"clip_high": -0.1}, "clip_high must be >= 0, got -0.1"),
    ((P, P, A), {"delta": 0.0}, "delta must be > 0 or None, got 0.0"),
    ((P, P, A), {"kl_weight": float("inf")}, "kl_weight must be finite, got inf"),
    ((P, P, A), {"kl_weight": 0.1}, "kl_weight must come with ref_logprob, got 0.1 without"),
    (
        (P, P, A),
        {"rollout_logprob": P},
        "rollout_logprob must come with truncated_importance, got rollout_logprob alone",
    ),
    (
        (P, P, A),
        {"truncated_importance": 2.0},
        "rollout_logprob must come with truncated_importance, got truncated_importance alone",
    ),
    (
        (P, P, A),
        {"rollout_logprob": P, "truncated_importance": 0.0},
        "truncated_importance must be > 0, got 0.0",
    ),
    ((P, P, A), {"normalizer": 0.0}, "normalizer must be > 0 and finite, got 0.0"),
    (
        (P, P, A),
        {"normalizer": A},
        "normalizer must be a number or one on cpu, got shape (2,) on cpu",
    ),
    ((P, P, A), {"max_length": 0}, "max_length must be >= 1, got 0"),
]


@backends
@pytest.mark.parametrize(("args", "options", "message"), HOSTILE)
def test_hostile_inputs(op: Backend, args: tuple, options: dict, message: str) -> None:
    if op.name == "cuda" and "on cpu" in message:
        pytest.skip("there it names another device")
    with pytest.raises(InputError) as caught:
        op(*args, **options)
    assert str(caught.value) == f"policy_loss: {message}"


def test_a_tensor_of_a_normalizer_must_be_positive() -> None:
    for value in (0.0, -1.0, float("nan")):
        with pytest.raises(InputError, match=r"^policy_loss: normalizer must be > 0, got "):
            policy_loss(P, P, A, loss_type="dapo", normalizer=torch.tensor(value))


def test_the_cuda_kernel_asserts_what_it_cannot_say() -> None:
    """Looking at a tensor would wait for the device: the loss is NaN, and an assertion fails."""
    with pytest.raises(InputError, match="device assertion: policy_loss: normalizer must be > 0"):
        CHECKED(P, P, A, loss_type="dapo", normalizer=torch.tensor(0.0))


@pytest.mark.parametrize(("args", "options", "message"), HOSTILE)
def test_raw_operator_is_safe_from_hostile_inputs(args: tuple, options: dict, message: str) -> None:
    if "meta" in message:
        pytest.skip("meta tensors take the fake")
    options = dict(options)
    tensors = [options.pop(k, None) for k in ("ref_logprob", "mask", "rollout_logprob")]
    if "normalizer" in options:
        key = "divisor" if isinstance(options["normalizer"], float) else "normalizer"
        options[key] = options.pop("normalizer")
    with pytest.raises(RuntimeError) as caught:
        RAW(*args, *tensors, options.pop("normalizer", None), **options)
    assert str(caught.value).startswith(f"policy_loss: {message.split(' must ')[0]} must ")
    assert len(str(caught.value).splitlines()) == 1
