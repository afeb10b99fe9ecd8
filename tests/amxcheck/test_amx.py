"""The emulated tile instructions against a model in numpy; the product of tiles; planted faults."""

import ctypes
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from amxcheck.emulator import (
    AMX,
    PLANTS,
    PROBES,
    ROOT,
    compiled,
    missing,
    planted,
    real,
    runtime,
    tiles,
)

Words = NDArray[np.uint32]
Floats = NDArray[np.float32]
PANEL, TILE = 48, 16

pytestmark = pytest.mark.skipif(missing() != "", reason=missing())
emulated_only = pytest.mark.skipif(missing() == "" and real(), reason="real tiles have no faults")


def probe(*faults: str) -> ctypes.CDLL:
    return compiled(PROBES / "tiles_probe.cpp", *AMX, *(f"-DRLIR_FAULT_{f}" for f in faults))


def pointer(x: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.ctypes.data)


# --- The model -----------------------------------------------------------------------------------


def flushed(x: NDArray) -> NDArray:
    """Subnormal float32 values become zeros of their sign."""
    tiny = np.abs(x) < np.finfo(np.float32).tiny
    return np.where(tiny, np.copysign(np.zeros_like(x), x), x)


def fused(a: Floats, b: Floats, c: Floats) -> Floats:
    """a b + c rounded once, to nearest even. The product of two bfloat16 is exact in float64; the
    sum is rounded to odd there, so that rounding it to float32 is right."""
    product = a.astype(np.float64) * b.astype(np.float64)
    wide = c.astype(np.float64)
    total = product + wide
    # What the sum lost (Knuth), whose sign says on which side of it the exact sum is.
    back = total - product
    lost = (product - (total - back)) + (wide - back)
    bits = total.view(np.int64)
    inexact = (lost != 0) & np.isfinite(total) & (bits & 1 == 0)
    towards_zero = (lost < 0) == (total > 0)
    total = np.where(inexact, (bits + np.where(towards_zero, -1, 1)).view(np.float64), total)
    return flushed(total.astype(np.float32))


def halves(words: Words) -> tuple[Floats, Floats]:
    """The even and the odd bfloat16 of words."""
    even, odd = (words << 16).view(np.float32), (words & 0xFFFF0000).view(np.float32)
    return flushed(even), flushed(odd)


def tdpbf16ps(c: Floats, a: Words, b: Words) -> Floats:
    """c [M, N] + a [M, K] b [K, N], words of two k, as in Intel's manual."""
    sums = []
    for x, y in zip(halves(a), halves(b), strict=True):
        total = np.zeros_like(c)
        for k in range(a.shape[1]):
            total = fused(x[:, k, None], y[None, k], total)
        sums.append(total)
    with np.errstate(invalid="ignore"):
        return flushed(flushed(c) + flushed(sums[0] + sums[1]))


def random_words(rng: np.random.Generator, *shape: int, scale: NDArray | None = None) -> Words:
    """Pairs of bfloat16 whose sums round in all ways."""
    values = rng.standard_normal((*shape, 2)) * 2.0 ** rng.integers(-6, 6, (*shape, 2))
    if scale is not None:
        values *= scale[..., None]
    bits = values.astype(np.float32).view(np.uint32) >> 16
    return np.ascontiguousarray(bits[..., 0] | bits[..., 1] << 16)


# --- Instructions --------------------------------------------------------------------------------


def configuration(*shapes: tuple[int, int]) -> NDArray[np.uint8]:
    """Of rows and words a row of tiles 0, 1, ..."""
    config = np.zeros(64, dtype=np.uint8)
    config[0] = 1
    for i, (rows, words) in enumerate(shapes):
        config[16 + 2 * i], config[48 + i] = 4 * words, rows
    return config


def dot(c: Floats, a: Words, b: Words, rng: np.random.Generator) -> Floats:
    """By the instruction, from rows further apart than they are long."""
    (m, k), n = a.shape, b.shape[1]
    wide = [np.full((len(x), x.shape[1] + int(rng.integers(1, 9))), 7, x.dtype) for x in (c, a, b)]
    for to, x in zip(wide, (c, a, b), strict=True):
        to[:, : x.shape[1]] = x
    config = configuration((m, n), (m, k), (k, n))
    with tiles():
        operands = [v for x in wide for v in (pointer(x), ctypes.c_int64(x.strides[0]))]
        probe().dot(pointer(config), *operands)
    assert np.all(wide[0][:, n:] == 7)
    return wide[0][:, :n]


def assert_instruction_is_the_model(seed: int, m: int, n: int, k: int, *, hostile: bool) -> None:
    rng = np.random.default_rng(seed)
    by_row, by_column = np.ones((m, 1)), np.ones((1, n))
    c = rng.standard_normal((m, n)).astype(np.float32)
    if hostile:  # near overflow and underflow, and subnormal
        scales = 2.0 ** np.array([-130.0, -64, -60, 0, 63])
        by_row, by_column = rng.choice(scales, (m, 1)), rng.choice(scales, (1, n))
        c *= rng.choice(2.0 ** np.array([-127.0, -100, 0, 120]), (m, n)).astype(np.float32)
    a, b = random_words(rng, m, k, scale=by_row), random_words(rng, k, n, scale=by_column)
    with np.errstate(over="ignore", invalid="ignore"):
        want = tdpbf16ps(c, a, b)
    got = dot(c, a, b, rng)
    nan = np.isnan(want)
    assert np.array_equal(np.isnan(got), nan)
    assert np.array_equal(got.view(np.uint32)[~nan], want.view(np.uint32)[~nan])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32 - 1),
    m=st.integers(1, 16),
    n=st.integers(1, 16),
    k=st.integers(1, 16),
    hostile=st.booleans(),
)
def test_tdpbf16ps_is_the_manuals(seed: int, m: int, n: int, k: int, hostile: bool) -> None:
    assert_instruction_is_the_model(seed, m, n, k, hostile=hostile)


@emulated_only
@pytest.mark.parametrize("fault", PLANTS)
def test_a_fault_in_an_instruction_is_found(fault: str) -> None:
    hostile = fault == "keeps subnormals"
    assert_instruction_is_the_model(0, 16, 16, 16, hostile=hostile)
    with planted(fault), pytest.raises(AssertionError):
        assert_instruction_is_the_model(0, 16, 16, 16, hostile=hostile)


@pytest.mark.parametrize(("rows", "words"), [(16, 16), (5, 16), (16, 3), (1, 1)])
def test_every_operand_is_decoded(rows: int, words: int) -> None:
    """Tiles are loaded and stored through all kinds of addresses, configurations kept."""
    rng = np.random.default_rng(0)
    tile = rng.integers(0, 256, (16, 64), dtype=np.uint8)
    to, kept = np.full((5, 16, 64), 9, dtype=np.uint8), np.full((3, 64), 9, dtype=np.uint8)
    config = configuration(*[(rows, words)] * 8)
    with tiles():
        probe().operands(*(pointer(x) for x in (config, tile, to, kept)))
    assert np.array_equal(kept[:2], [config, config])
    assert not kept[2].any()  # after the release
    expected = np.full((5, 16, 64), 9, dtype=np.uint8)
    expected[:3, :rows, : 4 * words] = tile[:rows, : 4 * words]
    expected[3, :rows, : 4 * words] = tile[0, : 4 * words]
    expected[4, :rows, : 4 * words] = 0
    assert np.array_equal(to, expected)


def run_apart(call: str, **changes: str) -> subprocess.CompletedProcess[str]:
    """The probe called by another process, on zeros: x of 1024 bytes, short of 1000."""
    code = f"""
import sys; sys.path[:0] = [{str(ROOT / "tests")!r}]
from amxcheck.test_amx import *
whole, unlike = configuration(*[(16, 16)] * 3), configuration((16, 16), (16, 4), (16, 16))
zeros, few = np.zeros(1024, np.uint8), np.zeros(1000, np.uint8)
fits, bad, x, short = (pointer(a) for a in (whole, unlike, zeros, few))
apart = ctypes.c_int64(64)
with tiles():
    probe().{call}
"""
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **changes},
        capture_output=True,
        text=True,
        check=False,
    )


@emulated_only
@pytest.mark.parametrize("call", ["unconfigured()", "dot(bad, x, apart, x, apart, x, apart)"])
def test_what_the_processor_refuses_ends_the_process(call: str) -> None:
    """Of the second one the k of a and of b differ."""
    done = run_apart(call)
    assert done.returncode == -signal.SIGILL, done.stderr
    assert "amx: no instruction that the emulator" in done.stderr


@emulated_only
@pytest.mark.skipif("LD_PRELOAD" in os.environ, reason="already under something else")
def test_the_sanitizer_sees_what_tiles_read_and_write() -> None:
    names = ("libasan.so", "libstdc++.so")
    ahead = [runtime(name) for name in names]
    if None in ahead:
        pytest.skip("the compiler has no AddressSanitizer")
    asan = {
        "LD_PRELOAD": " ".join(str(path) for path in ahead),
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1",
    }
    fine = run_apart("dot(fits, x, apart, x, apart, x, apart)", **asan)
    assert fine.returncode == 0, fine.stderr
    for call, what in (
        ("dot(fits, x, apart, short, apart, x, apart)", "READ"),
        ("dot(fits, x, apart, x, apart, short, apart)", "READ"),
        ("store(fits, short, apart)", "WRITE"),
    ):
        done = run_apart(call, **asan)
        assert done.returncode == -signal.SIGABRT
        assert "heap-buffer-overflow" in done.stderr
        assert f"{what} of size" in done.stderr


# --- The product ---------------------------------------------------------------------------------


def product_model(c: Floats | None, rows: Words, panel: Words) -> Floats:
    """Groups of 16 words, in order."""
    total = np.zeros((len(rows), panel.shape[1]), np.float32) if c is None else c.copy()
    for k in range(0, rows.shape[1], TILE):
        group = slice(k, k + TILE)
        a, b = (np.zeros(s, np.uint32) for s in ((len(rows), TILE), (TILE, panel.shape[1])))
        a[:, : rows[:, group].shape[1]], b[: len(panel[group])] = rows[:, group], panel[group]
        total = tdpbf16ps(total, a, b)
    return total


def assert_product_is_the_model(
    library: ctypes.CDLL, seed: int, count: int, words: int, lanes: int, *, more: bool
) -> None:
    """Around what is read are NaN, around what may be written values that must stay."""
    rng = np.random.default_rng(seed)
    nan = np.uint32(0x7FC07FC0)
    rows = np.full((count, words + 5), nan)
    panel = np.full((words + TILE, PANEL), nan)
    rows[:, :words] = random_words(rng, count, words)
    panel[:words] = random_words(rng, words, PANEL)
    c = np.full((-(-count // 32) * 32 + 2, PANEL), 3, np.float32)
    c[:count] = rng.standard_normal((count, PANEL))
    want = product_model(c[:count] if more else None, rows[:, :words], panel[:words])
    with tiles():
        library.product(
            *(pointer(c), pointer(rows), ctypes.c_int64(rows.shape[1]), ctypes.c_int64(count)),
            *(pointer(panel), ctypes.c_int64(words), lanes, int(more)),
        )
    assert np.array_equal(c[:count, :lanes].view(np.uint32), want[:, :lanes].view(np.uint32))
    assert np.all(c[-2:] == 3)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32 - 1),
    count=st.integers(1, 70),
    words=st.integers(0, 40),
    lanes=st.integers(1, PANEL),
    more=st.booleans(),
)
def test_the_product_is_groups_of_tdpbf16ps(
    seed: int, count: int, words: int, lanes: int, more: bool
) -> None:
    assert_product_is_the_model(probe(), seed, count, words, lanes, more=more)


def test_a_long_product_goes_on_in_c() -> None:
    """More words than are worked on at a time (kTileDepth)."""
    assert_product_is_the_model(probe(), 1, 17, 300, 33, more=False)


@pytest.mark.parametrize("fault", ["TILE_PADDING", "TILE_ROWS"])
def test_a_fault_in_the_product_is_found(fault: str) -> None:
    assert_product_is_the_model(probe(), 0, 32, 20, 48, more=False)
    faulty = probe(fault)
    with pytest.raises(AssertionError):
        assert_product_is_the_model(faulty, 0, 32, 20, 48, more=False)
